#!/bin/sh
# The engine on cgroup v2: limits, device rules, statistics, out of memory, a daemon that is killed; sizes on file systems
# with project quotas. Runs in the machine.
set -u
cd /payload
ip link set lo up
export BRIG_HOST=unix:///tmp/brig.sock
failures=0
root=/tmp/root
daemon() {
    ./brig daemon --data-root "$root" --exec-root /tmp/exec -H "$BRIG_HOST" --pidfile /tmp/brig.pid >>/tmp/daemon.log 2>&1 &
    tries=0
    until ./brig version >/dev/null 2>&1; do
        tries=$((tries + 1))
        [ "$tries" -lt 150 ] || { cat /tmp/daemon.log; exit 1; }
        sleep 0.2
    done
}
# expect NAME WANTED COMMAND...: the command's output is what is wanted.
expect() {
    name=$1 wanted=$2
    shift 2
    got=$("$@" 2>&1)
    if [ "$got" = "$wanted" ]; then
        echo "ok $name"
    else
        echo "FAILED $name: wanted '$wanted', got '$got'"
        failures=$((failures + 1))
    fi
}
daemon
mkdir -p /tmp/box/bin /tmp/box/tmp
cp "$(command -v busybox)" /tmp/box/bin/busybox
for program in sh cat echo sleep tail head mknod; do ln -s busybox "/tmp/box/bin/$program"; done
tar -C /tmp/box -c . | ./brig import - box >/dev/null
run="./brig run --rm --network none"
expect 'memory limit' 67108864 $run --memory 64m box cat /sys/fs/cgroup/memory.max
expect 'cpu limit' '50000 100000' $run --cpus 0.5 box cat /sys/fs/cgroup/cpu.max
expect 'pids limit' 50 $run --pids-limit 50 box cat /sys/fs/cgroup/pids.max
expect 'a cgroup namespace' 0::/ $run box cat /proc/self/cgroup
expect 'a device of the default set' ok $run box sh -c 'echo x >/dev/null && echo ok'
expect 'no other device' refused $run box sh -c 'mknod /tmp/disk b 254 0 && cat /tmp/disk >/dev/null 2>&1 || echo refused'
expect 'the bridge' ok ./brig run --rm box sh -c 'cat /sys/class/net/eth0/operstate >/dev/null && echo ok'
./brig run --name hungry --network none --memory 16m box sh -c 'tail /dev/zero' 2>/dev/null
expect 'out of memory is told' true ./brig inspect -f '{{.State.OOMKilled}}' hungry
./brig run -d --name steady --network none --memory 32m box sleep 1000 >/dev/null
expect 'pause' steady ./brig pause steady
expect 'unpause' steady ./brig unpause steady
./brig update --memory 48m --memory-swap 48m steady >/dev/null
expect 'an update reaches the cgroup' 50331648 ./brig exec steady cat /sys/fs/cgroup/memory.max
kill -9 "$(cat /tmp/brig.pid)"
daemon
expect 'it outlives the daemon' true ./brig inspect -f '{{.State.Running}}' steady
./brig rm -f steady hungry >/dev/null
expect 'no cgroup is left' '' find /sys/fs/cgroup/brigantine -mindepth 1 -type d
refused=$($run --storage-opt size=20M box true 2>&1)
expect 'no size without quotas' yes sh -c 'case $1 in *"mounted with '\''prjquota'\''"*) echo yes ;; *) echo "$1" ;; esac' sh "$refused"
kill "$(cat /tmp/brig.pid)"
while kill -0 "$(cat /tmp/brig.pid 2>/dev/null)" 2>/dev/null; do sleep 0.2; done
# sizes FS: what --storage-opt size and a volume's size do on it.
sizes() {
    fs=$1 root=/tmp/$1/root
    mkdir -p "/tmp/$fs"
    mount -o loop,prjquota "/payload/disk.$fs" "/tmp/$fs" || { echo "FAILED $fs: mount"; failures=$((failures + 1)); return; }
    daemon
    tar -C /tmp/box -c . | ./brig import - box >/dev/null
    write='head -c $1 /dev/zero >$2/x 2>/dev/null && echo written || echo refused'
    expect "$fs: within a container's size" written $run --storage-opt size=20M box sh -c "$write" sh 10000000 /tmp
    expect "$fs: beyond a container's size" refused $run --storage-opt size=20M box sh -c "$write" sh 30000000 /tmp
    expect "$fs: a container without a size" written $run box sh -c "$write" sh 30000000 /tmp
    ./brig run -d --name sized --network none --storage-opt size=20M box sleep 1000 >/dev/null
    head -c 30000000 /dev/zero >/tmp/large
    expect "$fs: cp is within the size, too" refused sh -c './brig cp /tmp/large sized:/large 2>/dev/null && echo copied || echo refused'
    ./brig rm -f sized >/dev/null
    ./brig volume create --opt size=8M small >/dev/null
    expect "$fs: within a volume's size" written $run -v small:/v box sh -c "$write" sh 4000000 /v
    expect "$fs: beyond a volume's size" refused $run -v small:/v box sh -c "$write" sh 16000000 /v
    expect "$fs: a removed volume's size is gone" small ./brig volume rm small
    kill "$(cat /tmp/brig.pid)"
    while kill -0 "$(cat /tmp/brig.pid 2>/dev/null)" 2>/dev/null; do sleep 0.2; done
    umount "/tmp/$fs"
}
modprobe loop
sizes xfs
sizes ext4
echo "engine: $failures failed"
[ "$failures" = 0 ]
