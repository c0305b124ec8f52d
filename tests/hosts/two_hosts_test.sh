#!/usr/bin/env bash
# Two hosts of two ranks each: network namespaces joined by a veth pair, UCX over TCP between them.
#   1. started by the environment that torchrun sets, bits compared with one host
#   2. started by mpirun with a launch agent, bits compared with one host
#   3. the link is cut in the middle of a forward, and of a backward: every rank ends with an error
#      that says why
# Needs root and iproute2; says so and skips where it may not make namespaces.
set -uo pipefail
rank_main=$PWD/$1
folder=$(mktemp -d)
id=$$
hosts=("nsa-$id-a" "nsa-$id-b")
addresses=(10.213.77.1 10.213.77.2)
failed=0

if ! ip netns add "${hosts[0]}" 2>"$folder/error"; then
  echo "SKIPPED: may not make network namespaces: $(cat "$folder/error")"
  exit 0
fi
clean_up() {
  for host in "${hosts[@]}"; do
    ip netns pids "$host" 2>/dev/null | xargs -r kill -9 2>/dev/null
    ip netns del "$host" 2>/dev/null
  done
  rm -rf "$folder"
}
trap clean_up EXIT
ip netns add "${hosts[1]}"
ip link add "veth-a" netns "${hosts[0]}" type veth peer name "veth-b" netns "${hosts[1]}"
for i in 0 1; do
  device=veth-$([[ $i == 0 ]] && echo a || echo b)
  ip -n "${hosts[$i]}" addr add "${addresses[$i]}/24" dev "$device"
  ip -n "${hosts[$i]}" link set "$device" up
  ip -n "${hosts[$i]}" link set lo up
done
# The kernel takes a moment to call a new link running; UCX passes over one that is not.
await_link() {
  for _ in $(seq 100); do
    ip -n "${hosts[0]}" link show veth-a | grep -q "state UP" &&
      ip -n "${hosts[1]}" link show veth-b | grep -q "state UP" && break
    sleep 0.1
  done
}
await_link

# The ranks of one machine must not find each other through its shared memory.
export UCX_TLS=tcp,self UCX_LOG_LEVEL=fatal

# start_rank RANK ARGS...: in the background, on its host, with torchrun's variables.
start_rank() {
  local rank=$1 host=${hosts[$(($1 / 2))]}
  shift
  RANK=$rank WORLD_SIZE=4 LOCAL_WORLD_SIZE=2 MASTER_ADDR=${addresses[0]} MASTER_PORT=29400 \
    ip netns exec "$host" "$rank_main" --backend=ucx "$@" >"$folder/$rank.out" 2>"$folder/$rank.err" &
}

expect() { # expect WHAT PATTERN FILE
  if grep -aEq "$2" "$3"; then
    echo "ok: $1"
  else
    echo "FAILED: $1: no line like '$2' in:"
    cat "$3"
    failed=1
  fi
}

echo "=== by rendezvous"
for rank in 0 1 2 3; do start_rank "$rank" --timeout_s=30; done
wait
for rank in 0 1 2 3; do expect "rank $rank has the bits of one host" "rank $rank: OK" "$folder/$rank.out"; done

echo "=== by mpirun with a launch agent"
cat >"$folder/agent" <<AGENT
#!/bin/sh
# Called as: agent ADDRESS COMMAND...; runs the command on that host, under that name.
case \$1 in ${addresses[0]}) host=${hosts[0]} ;; ${addresses[1]}) host=${hosts[1]} ;; esac
name=\$host
shift
exec ip netns exec \$host unshare --uts sh -c "hostname \$name; \$*"
AGENT
chmod +x "$folder/agent"
OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 timeout 60 \
  ip netns exec "${hosts[0]}" mpirun -n 4 --host "${addresses[0]}:2,${addresses[1]}:2" \
  --mca plm_rsh_agent "$folder/agent" --mca orte_keep_fqdn_hostnames 1 \
  --mca oob_tcp_if_include 10.213.77.0/24 --mca btl_tcp_if_include 10.213.77.0/24 \
  --mca pml ob1 --mca btl tcp,self --bind-to none -x UCX_TLS -x UCX_LOG_LEVEL \
  "$rank_main" --backend=ucx --timeout_s=30 >"$folder/mpi.out" 2>&1 </dev/null
for rank in 0 1 2 3; do expect "rank $rank has the bits of one host" "rank $rank: OK" "$folder/mpi.out"; done

for pass in forward backward; do
  echo "=== the link is cut in a $pass"
  ip -n "${hosts[0]}" link set veth-a up
  await_link
  for rank in 0 1 2 3; do start_rank "$rank" --timeout_s=5 "--${pass}s=100000"; done
  for _ in $(seq 100); do
    grep -q "$pass 3" "$folder/3.out" && break
    sleep 0.1
  done
  ip -n "${hosts[0]}" link set veth-a down
  start=$SECONDS
  wait
  elapsed=$((SECONDS - start))
  for rank in 0 1 2 3; do
    expect "rank $rank was in a $pass" "$pass 3" "$folder/$rank.out"
    expect "rank $rank says what it waited for" \
      "rank $rank: DEADLINE_EXCEEDED: .*rank [0-3] waited .* for rank" "$folder/$rank.out"
  done
  cat "$folder"/?.out | grep -a "^rank"
  if ((elapsed > 20)); then
    echo "FAILED: ranks took $elapsed s to notice, with a deadline of 5 s"
    failed=1
  fi
done
exit "$failed"
