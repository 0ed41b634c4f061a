#!/usr/bin/env bash
# Two nodes on one Linux machine: two network namespaces joined by a veth pair, a torchrun in each. Nothing but that cable
# joins the ranks of one with those of the other; the file system is shared, as a cluster's is.
#
#     examples/multi_node/two_namespaces.sh --steps 20 --inner eager --checkpoints build/two_nodes
#
# All options are those of examples/train_ep.py. Needs util-linux and iproute2, and root or a kernel that gives namespaces to
# everyone. Exits with 77 where namespaces cannot be made.
set -euo pipefail
cd "$(dirname "$0")/../.."

# Everything runs in process and network namespaces of its own: when this script ends, however it ends, the kernel ends what
# runs in them and removes them, with the cable.
if [ "${1-}" != --inside ]; then
    own=(unshare --net --pid --fork --kill-child)
    [ "$(id -u)" = 0 ] || own+=(--user --map-root-user)
    if ! said=$("${own[@]}" ip link add far0 type veth peer name far1 2>&1); then
        echo "no network namespaces here: $said" >&2
        exit 77
    fi
    exec "${own[@]}" "$0" --inside "$@"
fi
shift
trap 'exit 130' INT TERM

# The node's end of the cable, and then the command of every launcher in this folder. What a cluster's nodes know by their
# host names stands in the environment: PET_* are torchrun's own names for --local-addr and --rdzv-conf.
node() {
    local number=$1 device=far$1 address=10.213.7.$(($1 + 1))
    shift
    until ip link show "$device" >/dev/null 2>&1; do sleep 0.1; done
    ip addr add "$address/24" dev "$device"
    ip link set "$device" up
    ip link set lo up
    export PET_LOCAL_ADDR=$address PET_RDZV_CONF=is_host=$((number == 0))
    export GLOO_SOCKET_IFNAME=$device CUDA_VISIBLE_DEVICES=
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1     # a store of their own for workers that start again: see README.md
    exec "${TORCHRUN:-torchrun}" --nnodes 2 --nproc-per-node "${PROCESSES:-1}" --max-restarts 3 \
        --rdzv-backend c10d --rdzv-id train-ep --rdzv-endpoint 10.213.7.1:29500 \
        examples/train_ep.py "$@"
}
export -f node

# Node 1 lays the cable: only once it runs is its namespace sure to be there.
unshare --net bash -c "ip link add far1 type veth peer name far0 netns $$"' && node 1 "$@"' node "$@" &
(node 0 "$@") &
wait -n         # both must succeed; the first that fails ends the script, and so the other
wait -n
