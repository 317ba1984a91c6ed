#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains on a slice of Cloud TPUs; `launch/tpu.sh --help` says how.
set -euo pipefail

usage() {
    cat <<'EOF'
Trains on a slice of Cloud TPUs: creates it, sets it up, runs, watches, resumes, deletes.

launch/tpu.sh COMMAND [OPTION ...] [-- OPTION OF ip2p_jax.train ...]

  up      create, setup, run and watch
  create  ask for the slice; the request waits for its turn in Google's queue
  setup   wait for the slice, send this commit to the bucket, and install it on all hosts
  run     start the training on all hosts; it goes on without this computer
  watch   follow the run, and resume it after a preemption or a failure, until it is finished
  resume  do what is needed of: delete what is dead, create, install the same commit, run
  log     show the log of host 0 as it grows
  delete  delete the slice; nothing in the bucket is ever deleted
  jobset  print launch/gke/jobset.yaml, filled in, for kubectl

  --name NAME      of the slice and of the run, which is kept in BUCKET/NAME
  --zone ZONE      such as us-central2-b
  --type TYPE      v4-32, v5e-16, v5p-8, v6e-8, ...
  --bucket gs://BUCKET[/FOLDER]
  --config FILE    of the training (configs/tpu_v4.py)
  --data gs://...  data folder, copied to each host (none: what config.data.path says)
  --spot           costs less, and may be taken away at any time
  --delete         up and watch: delete the slice when the run is finished
  --project ID     (gcloud's)
  --runtime V      software of the hosts (what Google recommends for the type)
  --restarts N     in a row without a new checkpoint, after which watch gives up (10)
  --image IMAGE    jobset: made of launch/gke/Dockerfile
  --account NAME   jobset: Kubernetes service account that may use the bucket (default)
  --dry-run        print what would be done, and do none of it

Every option is an environment variable too: IP2P_NAME, IP2P_ZONE, ..., IP2P_SPOT=1. Four more:
  IP2P_CREATE, IP2P_SSH  more flags for gcloud's create and ssh, such as "--internal-ips"
  IP2P_POLL              seconds between two looks (60)
  IP2P_BACKOFF           seconds before the second restart in a row (30); doubled for each one
                         after it, up to 900

Exit codes: 0 done, 1 given up, 2 wrong input; gcloud's own where gcloud fails.

  export IP2P_ZONE=us-central2-b IP2P_BUCKET=gs://my-bucket/ip2p
  launch/tpu.sh up --name edits --type v4-32 --spot --data gs://my-bucket/shards \
      -- --config.checkpoint.every=250
  launch/tpu.sh watch --name edits --type v4-32 --spot      # again, from any computer
  launch/tpu.sh delete --name edits
EOF
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry=

say() { printf '%(%F %T)T %s\n' -1 "$*" >&2; }

stop() { # CODE MESSAGE
    printf 'error: %s\n' "$2" >&2
    exit "$1"
}

typed() { # prints a command as one would type it
    local word line=
    for word; do
        [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
        line+="$word "
    done
    printf '%s\n' "${line% }"
}

call() { if [[ $dry ]]; then typed "$@"; else "$@"; fi; }

## Input

parse() {
    local key
    while (($#)); do
        case $1 in
        --) shift && training=("$@") && break ;;
        --help | -h) usage && exit ;;
        --dry-run) dry=1 && shift ;;
        --spot) IP2P_SPOT=1 && shift ;;
        --delete) IP2P_DELETE=1 && shift ;;
        --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        --name | --zone | --type | --bucket | --config | --data | --project | --runtime | \
            --restarts | --image | --account)
            (($# > 1)) || stop 2 "$1: expected a value"
            key=${1#--}
            printf -v "IP2P_${key^^}" %s "$2"
            shift 2
            ;;
        *) stop 2 "$1: expected a command and its options, see --help" ;;
        esac
    done
}

need() { # VARIABLE PATTERN WHAT: checks an option
    local option=${1#IP2P_} value=${!1-}
    if [[ $1 == IP2P_POLL || $1 == IP2P_BACKOFF ]]; then option=$1; else option=--${option,,}; fi
    [[ $value ]] || stop 2 "$option is missing, expected $3"
    [[ $value =~ ^($2)$ ]] || stop 2 "$option $value: expected $3"
}

check() { # the options that all commands have, then those of this one
    local folder='gs://[a-z0-9][a-z0-9._-]+(/[A-Za-z0-9._-]+)*/?'
    IP2P_CONFIG=${IP2P_CONFIG:-configs/tpu_v4.py} IP2P_RESTARTS=${IP2P_RESTARTS:-10}
    IP2P_ACCOUNT=${IP2P_ACCOUNT:-default} IP2P_POLL=${IP2P_POLL:-60}
    IP2P_BACKOFF=${IP2P_BACKOFF:-30}
    [[ ${IP2P_SPOT:-1}${IP2P_DELETE:-1} == 11 ]] ||
        stop 2 "IP2P_SPOT, IP2P_DELETE: expected 1 or nothing"
    need IP2P_NAME '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' "up to 40 of a-z, 0-9 and -, first a letter"
    need IP2P_CONFIG '[A-Za-z0-9._/-]+' "a file"
    need IP2P_RESTARTS '[0-9]{1,4}' "a number"
    need IP2P_ACCOUNT '[a-z0-9]([a-z0-9.-]*[a-z0-9])?' "a Kubernetes service account"
    need IP2P_POLL '[0-9]+(\.[0-9]+)?' "seconds"
    need IP2P_BACKOFF '[0-9]{1,6}' "whole seconds"
    [[ $1 == jobset ]] || need IP2P_ZONE '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone, such as us-central2-b"
    [[ $1 == delete || $1 == log ]] && return
    IP2P_TYPE=${IP2P_TYPE/#v5e-/v5litepod-}
    need IP2P_TYPE '(v[234]|v5litepod|v5p|v6e)-[1-9][0-9]*' "a type of TPU, such as v4-32 or v5e-16"
    need IP2P_BUCKET "$folder" "gs://BUCKET or gs://BUCKET/FOLDER"
    [[ -z ${IP2P_DATA-} ]] || need IP2P_DATA "$folder" "gs://BUCKET/FOLDER"
    [[ -f $root/$IP2P_CONFIG ]] || stop 2 "--config $IP2P_CONFIG: no such file in $root"
    case $IP2P_TYPE in # https://cloud.google.com/tpu/docs/runtimes
    v5litepod-*) IP2P_RUNTIME=${IP2P_RUNTIME:-v2-alpha-tpuv5-lite} ;;
    v5p-*) IP2P_RUNTIME=${IP2P_RUNTIME:-v2-alpha-tpuv5} ;;
    v6e-*) IP2P_RUNTIME=${IP2P_RUNTIME:-v2-alpha-tpuv6e} ;;
    *) IP2P_RUNTIME=${IP2P_RUNTIME:-tpu-ubuntu2204-base} ;;
    esac
    need IP2P_RUNTIME '[a-z0-9.-]+' "a runtime version, such as tpu-ubuntu2204-base"
    workdir=${IP2P_BUCKET%/}/$IP2P_NAME
}

## Google's side

tpus() { call gcloud compute tpus "$@" --zone="$IP2P_ZONE" "${common[@]}"; }
storage() { call gcloud storage "$@" "${common[@]}"; }
describe() { tpus "$1" describe "$IP2P_NAME" --format="value($2)"; }
hosts() { # WHICH COMMAND
    tpus tpu-vm ssh "$IP2P_NAME" "${ssh[@]}" --worker="$1" --command="$2"
}

status="mkdir -p ip2p; if ! flock -n ip2p/lock true; then echo running; \
elif [ -s ip2p/exit ]; then cat ip2p/exit; else echo idle; fi"

# What is seen of the run: NONE (no request), a state of the request until it is ACTIVE, then one of
# the node until it is READY, then of the training: running, idle or `exit CODE`. `unknown` where
# gcloud does not answer, `silent` where host 0 does not.
condition() {
    local seen
    if ! seen=$(describe queued-resources state.state 2>"$scratch/error"); then
        if grep -q NOT_FOUND "$scratch/error"; then echo NONE; else echo unknown; fi
    elif [[ $seen != ACTIVE ]]; then
        echo "$seen"
    elif ! seen=$(describe tpu-vm state 2>/dev/null); then
        echo unknown
    elif [[ $seen != READY ]]; then
        echo "$seen"
    elif seen=$(hosts 0 "$status" 2>/dev/null); then
        echo "${seen##*$'\n'}"
    else
        echo silent
    fi
}

newest() { # the newest step of which there is a checkpoint, else -1
    local steps
    steps=$(storage ls "$workdir/checkpoints/" 2>/dev/null |
        sed -n 's|.*/\([0-9][0-9]*\)/$|\1|p' | sort -n | tail -n 1) || true
    echo "${steps:--1}"
}

finished() { [[ $(storage cat "$workdir/state" 2>/dev/null || true) == finished* ]]; }

mark() { # WORD: the run's state, which the training replaces when it is finished
    if [[ $dry ]]; then
        printf 'echo %s | ' "$1"
        storage cp - "$workdir/state"
    else
        storage cp - "$workdir/state" <<<"$1"
    fi
}

note() { # says what is seen, when it is another thing than before
    [[ $1 == "${noted-}" ]] || say "$IP2P_NAME: $1"
    noted=$1
}

await() { # waits until host 0 answers
    if [[ $dry ]]; then
        echo "# every $IP2P_POLL s, until the request is ACTIVE, the node READY and host 0 answers:"
        look
        return
    fi
    local now
    while now=$(condition); do
        note "$now"
        case $now in
        running | idle | exit*) return ;;
        NONE | FAILED | SUSPENDED | PREEMPTED | TERMINATED)
            stop 1 "$IP2P_NAME is $now, see resume"
            ;;
        esac
        sleep "$IP2P_POLL"
    done
}

look() { # prints what condition asks
    describe queued-resources state.state
    describe tpu-vm state
    hosts 0 "$status"
}

install() {
    local archive=$workdir/code.tar.gz
    hosts all "mkdir -p ip2p/code && gcloud storage cp --quiet $archive ip2p/ \
&& tar -xzf ip2p/code.tar.gz -C ip2p/code && bash ip2p/code/launch/install.sh"
}

## Commands

create() {
    local spot=()
    [[ -z ${IP2P_SPOT-} ]] || spot=(--spot)
    tpus queued-resources create "$IP2P_NAME" --node-id="$IP2P_NAME" \
        --accelerator-type="$IP2P_TYPE" --runtime-version="$IP2P_RUNTIME" "${spot[@]}" "${more[@]}"
}

delete() { tpus queued-resources delete "$IP2P_NAME" --force; }

setup() {
    [[ $dry ]] || git -C "$root" diff --quiet HEAD || say "what is not committed stays here"
    call git -C "$root" archive --format=tar.gz --output="$scratch/code.tar.gz" HEAD
    storage cp "$scratch/code.tar.gz" "$workdir/code.tar.gz"
    await
    install
}

# The lock is taken before the training is in the background, and goes with it. That of hosts which
# are about to notice that another one has died is waited for.
run() {
    local options=("--workdir=$workdir")
    [[ -z ${IP2P_DATA-} ]] || options+=("--data=$IP2P_DATA")
    options+=(-- "--config=$IP2P_CONFIG" "${training[@]}")
    mark started
    hosts all "cd ip2p && exec 9>>lock && flock -w 120 9 && rm -f exit && cd code && (nohup setsid \
../venv/bin/python launch/worker.py $(typed "${options[@]}") </dev/null >../worker.out 2>&1 &)" ||
        stop 1 "$IP2P_NAME: not started on all hosts; is it set up, and is nothing running there?"
    [[ $dry ]] || say "$IP2P_NAME: started; everything is kept in $workdir"
}

resume() {
    local now=dead
    [[ $dry ]] || now=$(condition)
    case $now in
    running) say "$IP2P_NAME is running" && return ;;
    NONE) create ;;
    dead | FAILED | SUSPENDED | PREEMPTED | TERMINATED)
        delete
        create
        ;;
    esac
    await
    install
    run
}

log() { hosts 0 'tail -n 100 -F ip2p/train.log'; }

watch() {
    if [[ $dry ]]; then
        echo "# every $IP2P_POLL s, until the state is finished:"
        storage cat "$workdir/state"
        storage ls "$workdir/checkpoints/"
        look
        echo "# after a preemption; after a failure of the training, run alone:"
        resume
        return
    fi
    local now step best=-1 restarts=0 wait failed=
    until finished; do
        step=$(newest)
        if ((step > best)); then
            say "$IP2P_NAME: step $step is saved"
            best=$step restarts=0
        fi
        now=$(condition)
        note "$now"
        case $now in
        NONE) [[ $failed ]] || stop 1 "$IP2P_NAME has been deleted; resume makes it again" ;;&
        'exit 2') stop 1 "the training refuses its input: see log, or $workdir/logs" ;;
        NONE | idle | exit* | FAILED | SUSPENDED | PREEMPTED | TERMINATED)
            ! finished || continue # since it was asked above
            ((++restarts <= IP2P_RESTARTS)) ||
                stop 1 "$IP2P_NAME: gave up after $IP2P_RESTARTS restarts without a new checkpoint"
            if ((restarts > 1)); then
                wait=$((IP2P_BACKOFF << (restarts < 22 ? restarts - 2 : 20)))
                sleep $((wait < 900 ? wait : 900))
            fi
            say "$IP2P_NAME: restart $restarts since step $step"
            noted='' failed='' # and a process of its own, which may fail
            "$root/launch/tpu.sh" resume -- "${training[@]}" || failed=1
            ;;
        esac
        sleep "$IP2P_POLL"
    done
    say "$IP2P_NAME is finished: $workdir"
    if [[ ${IP2P_DELETE-} ]]; then delete; else say "the slice is still there, see delete"; fi
}

up() {
    create
    setup
    run
    watch
}

topology() { # CHIPS -> how they are arranged, on GKE as in https://cloud.google.com/tpu/docs
    local known=" 4:2x2 8:2x4 16:4x4 32:4x8 64:8x8 128:8x16 256:16x16 "
    [[ $IP2P_TYPE != v4-* && $IP2P_TYPE != v5p-* ]] ||
        known=" 4:2x2x1 8:2x2x2 16:2x2x4 32:2x4x4 64:4x4x4 128:4x4x8 256:4x8x8 512:8x8x8 "
    [[ $known == *" $1:"* ]] || return 1
    known=${known#*" $1:"}
    echo "${known%% *}"
}

jobset() {
    local chips=${IP2P_TYPE#*-} label text key word
    local -A value
    need IP2P_IMAGE '[A-Za-z0-9._/:@-]+' "a container image"
    case $IP2P_TYPE in
    v4-*) chips=$((chips / 2)) label=tpu-v4-podslice ;;
    v5p-*) chips=$((chips / 2)) label=tpu-v5p-slice ;;
    v5litepod-*) label=tpu-v5-lite-podslice ;;
    v6e-*) label=tpu-v6e-slice ;;
    *) stop 2 "--type $IP2P_TYPE: expected v4, v5e, v5p or v6e on GKE" ;;
    esac
    value=([NAME]=$IP2P_NAME [IMAGE]=$IP2P_IMAGE [ACCOUNT]=$IP2P_ACCOUNT [ACCELERATOR]=$label
        [RESTARTS]=$IP2P_RESTARTS [HOSTS]=$((chips / 4)) [ARGS]="\"--workdir=$workdir\"")
    value[TOPOLOGY]=$(topology "$chips") ||
        stop 2 "--type $IP2P_TYPE: expected 4, 8, 16, ... 512 chips (v5e and v6e: 256)"
    [[ -z ${IP2P_DATA-} ]] || value[ARGS]+=", \"--data=$IP2P_DATA\""
    for word in -- "--config=$IP2P_CONFIG" "${training[@]}"; do
        word=${word//\\/\\\\}
        value[ARGS]+=", \"${word//\"/\\\"}\""
    done
    text=$(<"$root/launch/gke/jobset.yaml")
    [[ ${IP2P_SPOT-} ]] || text=$(grep -v '# only with --spot$' <<<"$text")
    for key in NAME RESTARTS HOSTS ACCOUNT ACCELERATOR TOPOLOGY IMAGE ARGS; do
        text=${text//"\${$key}"/"${value[$key]}"}
    done
    printf '%s\n' "$text"
}

((BASH_VERSINFO[0] >= 5)) || stop 2 "bash $BASH_VERSION: expected version 5 or newer"
training=()
case ${1---help} in
up | create | setup | run | watch | resume | log | delete | jobset) command=$1 ;;
--help | -h) usage && exit ;;
*) stop 2 "$1: expected up, create, setup, run, watch, resume, log, delete or jobset, see --help" ;;
esac
parse "${@:2}"
check "$command"
[[ $dry || $command == jobset ]] || command -v gcloud >/dev/null ||
    stop 2 "gcloud: not found, expected Google's Cloud CLI on the PATH"
common=(--quiet)
[[ -z ${IP2P_PROJECT-} ]] || common+=(--project="$IP2P_PROJECT")
read -ra more <<<"${IP2P_CREATE-}"
read -ra ssh <<<"${IP2P_SSH-}"
export "${!IP2P_@}"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$command"
