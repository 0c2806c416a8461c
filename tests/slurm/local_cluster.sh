#!/usr/bin/env bash
# local_cluster.sh - a real, throw-away SLURM cluster on loopback (Debian/Ubuntu packages).
#
#   local_cluster.sh start  DIR [--cpus N] [--gpus N] [--nodes N] [--mem MB] [--auth munge|none]
#                             [--no-install] [--sacct shim|none] [--max-array N] [--kill-wait S]
#   local_cluster.sh status DIR
#   local_cluster.sh stop   DIR [--purge]
#   local_cluster.sh env    DIR          # prints `export ...` lines: eval "$(local_cluster.sh env DIR)"
#
# Everything (keys, config, spool, logs, pids) lives under DIR; nothing in /etc/slurm, /etc/munge or
# /run is read or written, no init system is used, all ports are bound to loopback. It runs as root
# or as a plain user (jobs then run as that user; packages must be installed already).
# Every process is recorded in DIR/pids and is ended by pid, after checking that the pid is still ours.
set -u
PATH=$PATH:/usr/sbin:/sbin
die() { echo "local_cluster: $*" >&2; exit 1; }
say() { [ "${QUIET:-0}" = 1 ] || echo "local_cluster: $*"; }
now() { date +%s.%N; }

cmd=${1:-}; dir=${2:-}
[ -n "$cmd" ] && [ -n "$dir" ] || { sed -n '2,16p' "$0" | sed 's/^# \{0,1\}//'; exit 2; }
shift 2
cpus=$(env -u OMP_NUM_THREADS nproc); gpus=2; nodes=1; mem=; auth=munge; install=1; sacct=shim; purge=0; maxarray=1001; killwait=5
while [ $# -gt 0 ]; do case $1 in
  --cpus) cpus=$2; shift 2;; --gpus) gpus=$2; shift 2;; --nodes) nodes=$2; shift 2;;
  --mem) mem=$2; shift 2;; --auth) auth=$2; shift 2;; --sacct) sacct=$2; shift 2;; --max-array) maxarray=$2; shift 2;; --kill-wait) killwait=$2; shift 2;;
  --no-install) install=0; shift;; --purge) purge=1; shift;; *) die "unknown option $1";; esac; done
mkdir -p "$dir" || die "cannot create $dir"
dir=$(cd "$dir" && pwd -P)
export SLURM_CONF=$dir/slurm.conf

# pid is alive and is one of ours (its command line names our directory)
ours() { local c; c=$(tr '\0' ' ' <"/proc/$1/cmdline" 2>/dev/null) || return 1; case $c in *"$dir/"*) return 0;; esac; return 1; }

write_env() {
  mkdir -p "$dir/bin"
  printf 'export SLURM_CONF=%q\nexport PATH=%q:$PATH:/usr/sbin\n' "$SLURM_CONF" "$dir/bin" >"$dir/env.sh"
}

# accounting_storage/none has no sacct; submitit only learns that a job died without writing a result
# (OOM, SIGKILL, scancel) from sacct. This shim answers from the controller's own memory (scontrol).
write_sacct() {
  cat >"$dir/bin/sacct" <<'EOF'
#!/bin/sh
# sacct look-alike over `scontrol show job` (parsable2 output only). Known: -j -o/--format -X -n -P
ids= ; fields=JobID,State,NodeList ; head=1
while [ $# -gt 0 ]; do case $1 in
  -j|--jobs) ids="$ids,$2"; shift 2;; --jobs=*) ids="$ids,${1#*=}"; shift;; -j*) ids="$ids,${1#-j}"; shift;;
  -o|--format) fields=$2; shift 2;; --format=*) fields=${1#*=}; shift;;
  -n|--noheader) head=0; shift;; *) shift;; esac; done
scontrol -o show jobs 2>/dev/null | awk -v ids="$ids" -v fields="$fields" -v head="$head" '
BEGIN { n=split(fields,F,","); m=split(ids,I,","); for(i=1;i<=m;i++) if(I[i]!="") { want[I[i]]=1; any=1 }
  if(head){ l=""; for(i=1;i<=n;i++) l=l (i>1?"|":"") F[i]; print l } }
/^JobId=/ { split("",v); for(i=1;i<=NF;i++){ p=index($i,"="); if(p){ k=substr($i,1,p-1); if(!(k in v)) v[k]=substr($i,p+1) } }
  raw=v["JobId"]; id=raw; base=raw
  if("ArrayJobId" in v){ base=v["ArrayJobId"]; t=v["ArrayTaskId"]
    # array tasks cancelled before they started: the controller forgets which, so cover the whole range
    # first and let the lines of tasks that did start (printed after) override it
    lost = (t == 4294967294); if(lost) t = "0-1000"
    id = (t ~ /^[0-9]+$/) ? base "_" t : base "_[" t "]" } else lost=0
  if(any && !(base in want) && !(id in want) && !(raw in want)) next
  v["JobID"]=id; v["State"]=v["JobState"]; v["JobName"]=v["JobName"]
  if(v["NodeList"]=="" || v["NodeList"]=="(null)") v["NodeList"]="None assigned"
  v["Start"]=v["StartTime"]; v["End"]=v["EndTime"]; v["Elapsed"]=v["RunTime"]
  l=""; for(i=1;i<=n;i++) l=l (i>1?"|":"") v[F[i]]; if(lost) print l; else out[++c]=l }
END { for(i=1;i<=c;i++) print out[i] }'
EOF
  chmod 755 "$dir/bin/sacct"
}

free_port() { # first port >= $1 nobody listens on
  local p=$1; while (exec 3<>"/dev/tcp/127.0.0.1/$p") 2>/dev/null; do p=$((p + 1)); done; echo "$p"; }

case $cmd in
env) [ -f "$dir/env.sh" ] || die "no cluster in $dir"; cat "$dir/env.sh";;

start)
  t0=$(now)
  need=; for b in slurmctld slurmd sbatch srun scontrol; do command -v $b >/dev/null || need="slurmctld slurmd slurm-client"; done
  [ "$auth" = munge ] && ! command -v munged >/dev/null && need="$need munge"
  if [ -n "$need" ]; then
    [ $install = 1 ] || die "missing packages: $need"
    [ "$(id -u)" = 0 ] || die "missing packages ($need) and not root: ask an administrator, or run as root"
    say "installing $need"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q >"$dir/apt.log" 2>&1
    # policy-rc.d: keep the packages from starting system daemons of their own
    pol=/usr/sbin/policy-rc.d; had=0; [ -e $pol ] && had=1
    [ $had = 1 ] || { printf '#!/bin/sh\nexit 101\n' >$pol; chmod 755 $pol; }
    apt-get install -q -y --no-install-recommends $need >>"$dir/apt.log" 2>&1; rc=$?
    [ $had = 1 ] || rm -f $pol
    [ $rc = 0 ] || { tail -5 "$dir/apt.log" >&2; die "apt-get install failed (log: $dir/apt.log)"; }
  fi
  t1=$(now)
  [ -s "$dir/pids" ] && while read -r p _; do ours "$p" && die "already running in $dir (stop it first)"; done <"$dir/pids"
  : >"$dir/pids"; rm -rf "$dir/state" "$dir/spool" "$dir/log" "$dir/dev" "$dir/munge"
  mkdir -p "$dir/state" "$dir/log" "$dir/dev" "$dir/munge"; chmod 755 "$dir" "$dir/munge"
  host=$(hostname); user=$(id -un)
  [ -n "$mem" ] || mem=$(awk '/^MemTotal/ {print int($2/1024*0.9)}' /proc/meminfo)

  # --- munge: a private key owned by whoever runs this, so munged runs as that very user ---
  authconf="AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5"
  if [ "$auth" = munge ]; then
    (umask 077; dd if=/dev/urandom of="$dir/munge/key" bs=1024 count=1 2>/dev/null)
    [ ${#dir} -le 85 ] || die "directory name too long for a unix socket ($dir)"
    # --force: a private directory (say below /root, mode 700) is fine for a single-user cluster
    setsid munged --force --foreground --num-threads=10 --key-file="$dir/munge/key" --socket="$dir/munge/socket" \
      --pid-file="$dir/munge/pid" --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed" \
      >"$dir/log/munged.out" 2>&1 </dev/null &
    echo "$! munged" >>"$dir/pids"
    for _ in $(seq 50); do [ -S "$dir/munge/socket" ] && break; sleep 0.05; done
    [ -S "$dir/munge/socket" ] || { cat "$dir/log/munged.out" >&2; die "munged did not start"; }
    # cred_expire is also how long a requeued job waits before it may start again (default 120 s)
    authconf="AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5"
  fi

  # --- gpus that are only names: char devices ending in a digit, so CUDA_VISIBLE_DEVICES is set ---
  gres=; grestypes=; : >"$dir/gres.conf"
  if [ "$gpus" -gt 0 ]; then
    last=$((gpus - 1)); files="$dir/dev/gpu[0-$last]"
    for i in $(seq 0 $last); do mknod "$dir/dev/gpu$i" c 1 3 2>/dev/null || { files="/dev/tty[0-$last]"; break; }; done
    [ $gpus = 1 ] && files=${files/\[0-0\]/0}
    printf 'AutoDetect=off\nName=gpu File=%s\n' "$files" >"$dir/gres.conf"
    gres="Gres=gpu:$gpus"; grestypes="GresTypes=gpu"
  fi

  ctl=$(free_port $((20000 + $$ % 20000))); nodelines=; names=; p=$ctl
  for i in $(seq 1 "$nodes"); do
    p=$(free_port $((p + 1))); names="$names n$i"; mkdir -p "$dir/spool/n$i"
    nodelines="$nodelines
NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$p CPUs=$cpus RealMemory=$((mem / nodes)) $gres State=UNKNOWN"
  done
  cat >"$dir/slurm.conf" <<EOF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$ctl
SlurmUser=$user
SlurmdUser=$user
$authconf
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
PluginDir=$(ls -d /usr/lib/*/slurm-wlm /usr/lib/slurm /usr/lib64/slurm 2>/dev/null | head -1)
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=86400
MaxArraySize=$maxarray
KillWait=$killwait
ReturnToService=2
SlurmdTimeout=0
$grestypes$nodelines
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 State=UP
EOF
  write_env; rm -f "$dir/bin/sacct"; [ "$sacct" = shim ] && write_sacct

  setsid slurmctld -D -c -f "$SLURM_CONF" >"$dir/log/slurmctld.out" 2>&1 </dev/null &
  echo "$! slurmctld" >>"$dir/pids"
  for n in $names; do
    setsid slurmd -D -N "$n" -f "$SLURM_CONF" >"$dir/log/$n.out" 2>&1 </dev/null &
    echo "$! slurmd" >>"$dir/pids"
  done
  for _ in $(seq 200); do
    up=$(timeout 2 sinfo -h -N -p debug -o '%t' 2>/dev/null | grep -c '^idle$'); [ "$up" = "$nodes" ] && break; sleep 0.05
  done
  if [ "$up" != "$nodes" ]; then
    timeout 2 sinfo -N -o '%N %t %E' >&2; grep -hE 'error|fatal' "$dir"/log/*.log | grep -v pmix | tail -8 >&2
    "$0" stop "$dir" >&2; die "only ${up:-0} of $nodes nodes came up"
  fi
  say "up: $nodes node(s) x $cpus cpus, $gpus fake gpus, $(sbatch -V), auth/$auth; install $(awk "BEGIN{printf \"%.1f\",$t1-$t0}") s, start $(awk "BEGIN{printf \"%.1f\",$(now)-$t1}") s"
  say "use it: eval \"\$($0 env $dir)\"";;

status)
  [ -f "$dir/pids" ] || die "no cluster in $dir"; bad=0
  while read -r p n; do if ours "$p"; then echo "$n $p running"; else echo "$n $p gone"; bad=1; fi; done <"$dir/pids"
  [ -s "$dir/pids" ] || { echo "stopped"; exit 1; }
  [ $bad = 0 ] && { timeout 5 sinfo -N -o '%N %P %t %C %G %E' && timeout 5 squeue -o '%i %P %j %T %M %r' || bad=1; }
  exit $bad;;

stop)
  [ -f "$dir/pids" ] || { say "no cluster in $dir"; exit 0; }
  t0=$(now)
  if timeout 3 squeue -h >/dev/null 2>&1; then
    timeout 5 scancel -u "$(id -un)" 2>/dev/null; timeout 5 scancel -s KILL -b -u "$(id -un)" 2>/dev/null
    for _ in $(seq 60); do [ -z "$(timeout 2 squeue -h 2>/dev/null)" ] && break; sleep 0.1; done
  fi
  # job step daemons carry our SLURM_CONF in their environment; their children are the jobs
  for d in /proc/[0-9]*; do
    p=${d#/proc/}; [ "$p" != $$ ] || continue
    case $(cat "$d/comm" 2>/dev/null) in slurmstepd*)
      tr '\0' '\n' <"$d/environ" | grep -qx "SLURM_CONF=$SLURM_CONF" && kill -9 "$p";; esac
  done 2>/dev/null
  for want in slurmd slurmctld munged; do
    while read -r p n; do [ "$n" = $want ] && ours "$p" && kill "$p" 2>/dev/null; done <"$dir/pids"
  done
  left=1
  for _ in $(seq 100); do left=0; while read -r p _; do ours "$p" && left=1; done <"$dir/pids"; [ $left = 0 ] && break; sleep 0.1; done
  if [ $left = 1 ]; then while read -r p _; do ours "$p" && kill -9 "$p"; done <"$dir/pids"; fi
  : >"$dir/pids"
  say "stopped in $(awk "BEGIN{printf \"%.1f\",$(now)-$t0}") s"
  [ $purge = 1 ] && rm -rf "$dir"
  exit 0;;
*) die "unknown command $cmd (start|stop|status|env)";;
esac
