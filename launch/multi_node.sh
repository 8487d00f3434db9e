#!/usr/bin/env bash
# Train or evaluate on several machines without a scheduler: torchrun, once on each machine. See --help.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: launch/multi_node.sh --nodes N --node-rank K --head HOST[:PORT] [-n PROCESSES] [--max-restarts R]
                            train CONFIG [--set A.B=V]... | evaluate RUN ...

Run the same line on each of N machines, with a different K on each. The order does not matter: they wait for each other.

  --nodes N         number of machines
  --node-rank K     which of them this machine is, 0 to N - 1; HOST is machine 0
  --head HOST:PORT  name or address of machine 0 that all others can reach, and a free port there (default: 29500)
  -n PROCESSES      processes on each machine (default: its number of GPUs, or 1 without one)
  --max-restarts R  after the failure of a process, restart all of them up to R times from the newest checkpoint
                    (default: 3)
  --address ADDR    address at which the others reach this machine, if its host name is not (default for
                    machine 0: HOST)
  -h, --help        this text

The checkout, Python, the data and runs_dir must have the same path on all machines; runs_dir must be on a shared file
system.
Environment: RATING_TRAIN_PYTHON, OMP_NUM_THREADS as in launch/local.sh; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME
select the network between the machines where the wrong one is chosen.
Stop it with Ctrl-C on any machine or `touch RUN/STOP`: it saves a checkpoint first, and the same lines resume from it.
USAGE
}

die_early() {
    printf 'multi_node.sh: error: %s\n' "$*" >&2
    exit 2
}

nodes="" rank="" head="" processes="" restarts=3 address=""
while (($#)); do
    case "$1" in
        -h | --help)
            usage
            exit 0
            ;;
        --nodes | --node-rank | --head | -n | --max-restarts | --address)
            (($# > 1)) || die_early "$1 needs a value (launch/multi_node.sh --help)"
            case "$1" in
                --nodes) nodes="$2" ;;
                --node-rank) rank="$2" ;;
                --head) head="$2" ;;
                -n) processes="$2" ;;
                --max-restarts) restarts="$2" ;;
                --address) address="$2" ;;
            esac
            shift 2
            ;;
        -*) die_early "unknown option $1 (launch/multi_node.sh --help)" ;;
        *) break ;;
    esac
done

[[ "$nodes" =~ ^[1-9][0-9]*$ ]] || die_early "--nodes is '$nodes', expected a number of machines, 1 or more"
if ! [[ "$rank" =~ ^[0-9]+$ ]] || ((rank >= nodes)); then
    die_early "--node-rank is '$rank', expected 0 to $((nodes - 1))"
fi
[[ -n "$head" ]] || die_early "--head is missing: the name or address of machine 0, HOST or HOST:PORT"
host="${head%:*}" port=29500
[[ "$head" != *:* ]] || port="${head##*:}"
[[ -n "$host" && "$port" =~ ^[1-9][0-9]*$ ]] || die_early "--head is '$head', expected HOST or HOST:PORT"
[[ -z "$processes" || "$processes" =~ ^[1-9][0-9]*$ ]] || die_early "-n is '$processes', expected a number of processes, 1 or more"
[[ "$restarts" =~ ^[0-9]+$ ]] || die_early "--max-restarts is '$restarts', expected a number, 0 or more"
getent hosts "$host" >/dev/null || die_early "--head: this machine cannot resolve '$host'; give its address"

verb="${1:-}"
case "$verb" in
    train) what="configuration file" ;;
    evaluate) what="run directory" ;;
    *) die_early "expected train or evaluate, found '$verb' (launch/multi_node.sh --help)" ;;
esac
shift

# shellcheck source=launch/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

rt_start "$processes" 1 "$verb" "$what" "$@"
rt_traces "$RT_RUN"
# Only machine 0 hosts the rendezvous, even where torchrun cannot tell from the name that it is machine 0.
is_host=0
if ((rank == 0)); then
    is_host=1
    address="${address:-$host}"
fi
exec "$PYTHON" -m rating_train.distributed.launcher "$RT_RUN" --nnodes "$nodes" --nproc-per-node "$RT_PROCESSES" \
    --rdzv-backend c10d --rdzv-endpoint "$host:$port" --rdzv-id "rating_train" --rdzv-conf "is_host=$is_host" \
    ${address:+--local-addr "$address"} --max-restarts "$restarts" -m rating_train "$verb" "$@"
