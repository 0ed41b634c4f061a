"""Ways to look at a report. Each takes what ``Report.to_dict`` returns (or a file of it) and adds no figure of its own.

    version, model, graph, rank, summary, options
    unchanged   {code, text} where nothing was rewired, else null
    layers      [{index, kind: "moe" | "mlp", label, connectivity, requested, rewired, refused: {code, text} | null,
                  reads: [{block, now, was}], attention first,
                  blocks: [{layer, block, label, evidence, certain, shared, exchange, reads, adds, operations, source}]}]
    changes     [{layer, block, node, op, was, now, source}]     the edges of the graph that lead elsewhere now
    collectives ["all_to_all_single of float32 [?, 512] over ranks [0, 1]", ...]    in the order that all ranks share
    phases      [{name, bound_s, reason, before: timeline, after: timeline}]
                timeline: {seconds, exposed_s, peak_bytes, events: [...], collectives: [...]}, see passes/timeline.py
    folded      {layers, traced, period}: layers beyond ``traced`` are repetitions; null where all were traced
    counts, seconds, errors
"""
