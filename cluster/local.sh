#!/usr/bin/env bash
# A Ray cluster on this machine: a head that takes no work and N workers, each its own `ray start` with its own
# folder and ports, on loopback, closed by a token. Every process carries a mark in its environment; `down` ends
# the processes with this cluster's mark and no others (`ray stop` would end every Ray process of the machine).
set -euo pipefail

usage() {
  cat <<'HELP'
usage: cluster/local.sh up [N] [options]     a head and N workers (default 2)
       cluster/local.sh kill I [options]     end worker I as a power cut would: all its processes, at once (0: the head)
       cluster/local.sh add [options]        start the head, or else the first worker, that was killed, or one more
       cluster/local.sh status [options]     nodes, resources and processes; exit code 1 when nothing is up
       cluster/local.sh down [options]       end what `up` started and remove its folder, logs included

  --cpus C            CPUs of each worker, as Ray counts them (default: this machine's cores / N, at least 1)
  --gpus G            GPUs of each worker (default 0); each worker sees only its own
  --redis             keep what the head knows in a Redis of its own, from which it comes back after `kill 0`
  --labels K=V[,K=V]  labels of worker 1; again for worker 2, and so on (default: none)
  --port P            the head's port (default 6379); nodes take P+20 ... P+20+10*(N+1)
  --dashboard-port P  dashboard and job submission (default 8265)
  --dir FOLDER        logs, token and state (default /tmp/rairl-cluster-UID); one cluster a folder, keep it short
HELP
}

fail() { echo "local.sh: error: $1" >&2; exit 2; }
whole() { [[ $2 =~ ^[0-9]{1,6}$ ]] || fail "$1 is '$2'; give a whole number"; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
verb=${1:-} number=2 cpus="" gpus=0 labels="" redis=no port=6379 dashboard=8265 folder=/tmp/rairl-cluster-$UID
[ $# -eq 0 ] || shift
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --redis) redis=yes; shift ;;
    --cpus | --gpus | --labels | --port | --dashboard-port | --dir)
      [ $# -ge 2 ] || fail "$1 lacks its value; see cluster/local.sh --help"
      case $1 in --dir | --labels) ;; *) whole "$1" "$2" ;; esac
      case $1 in
        --cpus) cpus=$2 ;;
        --gpus) gpus=$2 ;;
        --labels)
          [[ $2 =~ ^[A-Za-z0-9._/-]+=[A-Za-z0-9._-]+(,[A-Za-z0-9._/-]+=[A-Za-z0-9._-]+)*$ ]] \
            || fail "--labels '$2'; write KEY=VALUE, several with commas between them"
          labels+="$2 "
          ;;
        --port) port=$2 ;;
        --dashboard-port) dashboard=$2 ;;
        --dir) folder=$(realpath -m -- "$2") ;;
      esac
      shift 2
      ;;
    -*) fail "unknown option $1; see cluster/local.sh --help" ;;
    *) whole "the number after $verb" "$1"; number=$1; shift ;;
  esac
done
workers=$number

state=$folder/state token=$folder/token
bin=$here/../.venv/bin
[ -x "$bin/ray" ] || bin=$(dirname "$(command -v ray || echo /none/ray)")
address() { echo "127.0.0.1:$port"; }
answers() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# Reads what `up` wrote down: port, dashboard, workers, mark. False where this script has no cluster in the folder.
known() {
  [ -f "$state" ] || return 1
  [ -O "$state" ] || fail "$folder belongs to $(stat -c %U "$folder"), who alone may use it; choose another --dir"
  local key value
  while IFS='=' read -r key value; do
    case $key in
      port) port=$value ;;
      dashboard) dashboard=$value ;;
      workers) workers=$value ;;
      cpus) cpus=$value ;;
      gpus) gpus=$value ;;
      labels) labels=$value ;;
      redis) redis=$value ;;
      mark) mark=$value ;;
    esac
  done <"$state"
}

# Process ids with this cluster's mark, children of the nodes and of jobs included.
processes() {
  grep -lzxF "RAIRL_LOCAL_CLUSTER=$mark" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3 | grep -vx "$$" || true
}

# Those of node $1 alone: what Ray started in its folder, and everything below that.
node_processes() {
  local all found pid parent more
  all=$(processes)
  found=" "
  for pid in $all; do
    tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qE "$folder/$1(/| |$)" && found+="$pid "
  done
  more=1
  while [ "$more" -eq 1 ]; do
    more=0
    for pid in $all; do
      parent=$(cut -d' ' -f4 <<<"$(sed 's/^.*) /0 0 /' "/proc/$pid/stat" 2>/dev/null)")
      if [[ $found == *" ${parent:-none} "* && $found != *" $pid "* ]]; then
        found+="$pid "
        more=1
      fi
    done
  done
  echo "$found"
}

end_processes() {
  local signal deadline left
  for signal in TERM KILL; do
    deadline=$((SECONDS + 6)) # some helpers of Ray ignore TERM for ever
    while left=$(processes) && [ -n "$left" ] && [ $SECONDS -lt $deadline ]; do
      # shellcheck disable=SC2086  # one word a process
      kill -s "$signal" $left 2>/dev/null || true
      sleep 0.5
    done
  done
  [ -z "$(processes)" ] || fail "processes $(processes | tr '\n' ' ')do not end, even by kill -9"
}

nodes_ports() { # the ports of node $1: agent (http, grpc), runtime environments, metrics, node and object manager
  local base=$((port + 20 + 10 * $1))
  echo $base $((base + 1)) $((base + 2)) $((base + 3)) $((base + 4)) $((base + 5))
}

ports_in_use() { # of all that the cluster needs
  local ports="$port $((port + 1)) $((port + 2)) $dashboard" i
  for ((i = 0; i <= workers; i++)); do ports+=" $(nodes_ports "$i")"; done
  # shellcheck disable=SC2086  # one word a port
  "$bin/python" - $ports <<'PY'
import socket, sys
busy = []
for port in sys.argv[1:]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(port)))
            probe.listen()
        except (OSError, OverflowError):
            busy.append(port)
print(" ".join(busy))
PY
}

check() {
  [ -d /proc/self ] || fail "needs Linux's /proc to know its own processes"
  [ -x "$bin/ray" ] || fail "no ray here; run 'make install' first"
  [ "$workers" -ge 1 ] || fail "N is $workers; a cluster needs at least 1 worker, as the head takes no work"
  [ ${#folder} -le 40 ] || fail "--dir $folder is longer than 40 characters; Ray's sockets below it would exceed 107"
  [[ $folder != *[[:space:]\'\"]* ]] || fail "--dir '$folder' has a blank or a quote in it; choose a plain name"
  [ ! -e "$folder" ] || [ -O "$folder" ] || fail "$folder belongs to somebody else; choose another --dir"
  [ ! -f "$state" ] || fail "a cluster of $folder is up or half up; 'cluster/local.sh down' ends it"
  [ ! -e "$folder" ] || rmdir "$folder" 2>/dev/null || fail "$folder exists and is not empty; choose another --dir"
  local tool
  [ "$redis" = no ] || for tool in redis-server openssl; do
    command -v "$tool" >/dev/null \
      || fail "--redis: no $tool here; install it (Debian: apt-get install $tool) or leave --redis out"
  done
  local have=0 used
  [ "$gpus" -eq 0 ] || have=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  [ $((gpus * workers)) -le "$have" ] \
    || fail "--gpus $gpus for $workers workers needs $((gpus * workers)) GPUs; this machine has $have"
  used=$(ports_in_use)
  [ -z "$used" ] || fail "port(s) in use or above 65535: $used; end who has them, or choose others by --port and --dashboard-port"
}

# `ray`, but 127.0.0.1 stays 127.0.0.1: Ray replaces it by the machine's outer address, and then listens there.
# Its own switch against that (below, for drivers and jobs) refuses a second node, so here it is set from inside.
loopback_ray='
import sys
from ray._private import ray_constants, services
ray_constants.ENABLE_RAY_CLUSTER = True
services.resolve_ip_for_localhost = lambda host: "127.0.0.1"
from ray.scripts.scripts import main
sys.argv[0] = "ray"
main()
'

start_node() { # start_node I ARGUMENTS...: node I of the cluster, with its own folder and ports; its log if it fails
  local i=$1 log=$folder/start-$1.log
  shift
  local p
  read -ra p <<<"$(nodes_ports "$i")"
  # Worker ports 0: the system picks them; Ray's own range would be the same on every node. The mark is set here
  # alone, or this script's own helpers would bear it. SPT_NOENV: or the titles that Ray's agents give themselves
  # are written over their environment, and the mark with it.
  RAIRL_LOCAL_CLUSTER=$mark SPT_NOENV=1 timeout 180 "$bin/python" -c "$loopback_ray" start "$@" --node-ip-address 127.0.0.1 --temp-dir "$folder/$i" \
    --object-store-memory "$store" --min-worker-port 0 --max-worker-port 0 \
    --dashboard-agent-listen-port "${p[0]}" --dashboard-agent-grpc-port "${p[1]}" \
    --runtime-env-agent-port "${p[2]}" --metrics-export-port "${p[3]}" \
    --node-manager-port "${p[4]}" --object-manager-port "${p[5]}" >"$log" 2>&1 </dev/null || {
    echo "$log"
    return 1
  }
}

# Redis outlives the head and belongs to this cluster: its mark, on loopback, nothing on disk but what stands here. It
# answers who holds the key in its folder; Ray would show a password to everybody, in the head's command line. Its
# own title would be written over its environment, and the mark with it.
start_redis() {
  local tls=$folder/redis deadline=$((SECONDS + 20))
  mkdir "$tls"
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 -subj /CN=127.0.0.1 \
    -keyout "$tls/key" -out "$tls/cert" >"$tls/log" 2>&1 || { echo "$tls/log"; return 1; }
  printf '%s\n' "bind 127.0.0.1" "port 0" "tls-port $((port + 2))" "tls-auth-clients yes" "tls-cert-file $tls/cert" \
    "tls-key-file $tls/key" "tls-ca-cert-file $tls/cert" "dir $tls" "logfile $tls/log" 'save ""' \
    "set-proc-title no" >"$tls/conf"
  RAIRL_LOCAL_CLUSTER=$mark setsid redis-server "$tls/conf" >>"$tls/log" 2>&1 </dev/null &
  until answers $((port + 2)); do
    [ $SECONDS -lt $deadline ] || { echo "$tls/log"; return 1; }
    sleep 0.1
  done
}

start_head() {
  if [ "$redis" = yes ]; then # exported for the subshell alone that calls this, as its output is the name of a log
    export RAY_REDIS_ADDRESS=rediss://127.0.0.1:$((port + 2)) RAY_REDIS_CA_CERT=$folder/redis/cert \
      RAY_REDIS_CLIENT_CERT=$folder/redis/cert RAY_REDIS_CLIENT_KEY=$folder/redis/key
  fi
  CUDA_VISIBLE_DEVICES="" start_node 0 --head --port "$port" --num-cpus 0 --num-gpus 0 \
    --ray-client-server-port $((port + 1)) \
    --include-dashboard true --dashboard-host 127.0.0.1 --dashboard-port "$dashboard"
}

start_worker() { # start_worker I
  local each
  read -ra each <<<"$labels"
  CUDA_VISIBLE_DEVICES=$(seq -s, $((($1 - 1) * gpus)) $(($1 * gpus - 1))) \
    start_node "$1" --address "$(address)" --num-cpus "$cpus" --num-gpus "$gpus" --labels "${each[$(($1 - 1))]:-}"
}

why() { grep -v '^[[:space:]]*$' "$1" | tail -1 || true; }

given_up() { # given_up WHAT LOG: the end of an `up` of which a node, or Redis, did not start
  local said
  said=$(why "$2")
  end_processes
  mv "$2" "$folder.log"
  rm -rf "${folder:?}"
  fail "$1 did not start (${said:-no answer in 180 s}); its output is in $folder.log"
}

environment() { # what the nodes of this cluster are started with
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token RAY_USAGE_STATS_ENABLED=0
  export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
  unset RAY_ADDRESS RAY_AUTH_TOKEN RAY_REDIS_ADDRESS
  store=$(($(awk '/^MemTotal/ {print $2}' /proc/meminfo) * 1024 * 3 / 10 / (workers + 1)))
}

write_state() {
  printf '%s\n' "port=$port" "dashboard=$dashboard" "workers=$workers" "mark=$mark" "cpus=$cpus" "gpus=$gpus" \
    "labels=$labels" "redis=$redis" >"$state"
}

up() {
  check
  local i cores log
  cores=$(nproc)
  [ -n "$cpus" ] || cpus=$((cores / workers > 0 ? cores / workers : 1))
  umask 077
  mkdir -p "$folder"
  "$bin/python" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$token"
  mark=$folder:$("$bin/python" -c 'import secrets; print(secrets.token_hex(8))')
  write_state
  printf 'export %s\n' "RAY_ADDRESS=http://127.0.0.1:$dashboard" RAY_AUTH_MODE=token \
    "RAY_AUTH_TOKEN_PATH=$token" RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 >"$folder/env"
  environment
  trap 'end_processes; rm -rf "${folder:?}"; exit 130' INT TERM
  [ "$redis" = no ] || log=$(start_redis) || given_up Redis "$log"
  log=$(start_head) || given_up "node 0" "$log"
  echo "head: $(address), takes no work"
  for ((i = 1; i <= workers; i++)); do
    log=$(start_worker "$i") || given_up "node $i" "$log"
    echo "worker $i of $workers: $cpus CPUs, $gpus GPUs"
  done
  trap - INT TERM
  cat <<TEXT

dashboard  http://127.0.0.1:$dashboard (asks for the token in $token)
logs       $folder/0 (head), $folder/1 ... $folder/$workers: session_latest/logs

In the shell that uses it:
  source $folder/env                    # RAY_ADDRESS and the token's path
  python launch.py train experiments/demo/airl.yaml cluster.address=$(address)
  python launch.py submit train experiments/demo/airl.yaml       # as a job, which survives your shell
  cluster/local.sh down                 # ends it and removes $folder
TEXT
}

status() {
  if ! known; then
    echo "local.sh: no cluster of this script in $folder"
    answers "$port" && echo "local.sh: something else answers at $(address)"
    return 1
  fi
  echo "cluster    $(address), dashboard http://127.0.0.1:$dashboard, $workers workers, logs in $folder"
  echo "processes  $(processes | wc -l)"
  # shellcheck source=/dev/null
  . "$folder/env"
  timeout 60 "$bin/ray" status --address "$(address)" 2>/dev/null || {
    echo "local.sh: the head does not answer; 'cluster/local.sh down' clears up, logs are in $folder/0/session_latest/logs"
    return 1
  }
}

down() {
  if ! known; then
    ! answers "$port" \
      || fail "the cluster at $(address) was not started by this script in $folder; whoever started it must end it"
    echo "local.sh: nothing to end in $folder"
    return
  fi
  end_processes
  # A killed process may hold its sockets a moment longer, and another cluster may want the ports next.
  local deadline=$((SECONDS + 10))
  while [ -n "$(ports_in_use)" ] && [ $SECONDS -lt $deadline ]; do sleep 0.2; done
  rm -rf "${folder:?}"
  echo "local.sh: $(address) is down, $folder removed"
}

ours() { known || fail "no cluster of this script in $folder; 'cluster/local.sh up' starts one"; }

name_of() { [ "$1" -eq 0 ] && echo "the head" || echo "worker $1"; }

kill_node() {
  ours
  [[ $number -le $workers ]] || fail "kill $number: the workers are 1 to $workers, the head is 0"
  [[ $number -ge 1 || $redis = yes ]] \
    || fail "kill 0: this head's cluster would end with it ('down' does that); 'up --redis' makes one that comes back"
  local found
  found=$(node_processes "$number")
  [ -n "${found// /}" ] || fail "kill $number: $(name_of "$number") does not run"
  # shellcheck disable=SC2086  # one word a process
  kill -KILL $found 2>/dev/null || true
  mv "$folder/$number" "$folder/$number-killed-$(date +%s)"
  echo "local.sh: $(name_of "$number") is gone; 'cluster/local.sh add' starts it again"
}

add_node() {
  ours
  local i=1 log had=$workers
  umask 077
  environment
  if [ ! -d "$folder/0" ]; then
    log=$(start_head) || fail "the head did not start ($(why "$log")); its output is in $log"
    echo "head: $(address), takes no work"
    return
  fi
  while [ "$i" -le "$had" ] && [ -d "$folder/$i" ]; do i=$((i + 1)); done
  log=$(start_worker "$i") || fail "worker $i did not start ($(why "$log")); its output is in $log"
  workers=$((i > had ? i : had))
  write_state
  echo "worker $i of $workers: $cpus CPUs, $gpus GPUs"
}

case $verb in
  up | down | status) "$verb" ;;
  kill | add) "${verb}_node" ;;
  -h | --help | help) usage ;;
  *) fail "unknown verb '${verb}'; up, down, status, kill or add (see --help)" ;;
esac
