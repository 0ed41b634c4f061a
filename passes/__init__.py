"""Graph passes: each a function from a graph to a graph and a result dataclass, with no I/O and no globals.

Installed as ``farskip_fx.passes``. ``farskip_fx`` imports passes; passes never import ``farskip_fx``.
"""
