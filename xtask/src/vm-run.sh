#!/bin/sh
# All tests that were brought along, in the machine. What a test needs is there: BRIG_TEST_STRICT makes it fail rather
# than pass over what it does not find.
export BRIG_TEST_DIST=/payload BRIGANTINE_RUNTIME=/payload/brig-runtime CARGO_TARGET_DIR=/payload/target
export BRIG_TEST_STRICT=1 BRIG_TEST_FUZZ=/payload/fuzz
# A file system that has idmapped mounts on this kernel, which tmpfs has not; and /run as every machine has it.
export TMPDIR=/payload/tmp
mkdir -p -m 1777 "$TMPDIR"
chmod 755 /run
failed=
# Of the networks' tests those that other machines have not got the kernel for, and how names are led there on an older one.
# First on a kernel without nf_tables, which must not have been loaded before.
for test in tests/network-*; do
    [ -e "$test" ] || continue
    echo "== $test without nf_tables"
    echo 'install nf_tables /bin/false' >/etc/modprobe.d/without.conf
    "./$test" --test-threads 1 iptables::auto packets::iptables::a_published_port_is_reached_from ||
        failed="$failed ${test#tests/}(iptables)"
    rm /etc/modprobe.d/without.conf
    for module in 8021q macvlan ipvlan dummy sctp; do modprobe "$module"; done
    echo "== $test"
    "./$test" --test-threads 1 802_1q vlan sctp parent names:: || failed="$failed ${test#tests/}"
done
if [ -e engine.sh ]; then
    echo "== the engine"
    sh ./engine.sh || failed="$failed engine"
fi
for test in tests/*; do
    case $test in tests/network-*) continue ;; esac
    [ -e "$test" ] || continue
    echo "== $test"
    "./$test" --test-threads 2 || failed="$failed ${test#tests/}"
done
# The tests of the systemd driver once more, below systemd: as PID 1 of namespaces of its own, in a part of the cgroup
# hierarchy that it takes for the whole.
under_systemd() {
    test=/payload/$1
    echo "== $1 below systemd"
    mkdir -p /payload/out /etc/systemd/system
    cat >/etc/systemd/system/brig-tests.service <<EOF
[Unit]
Requires=dbus.service
After=dbus.service
[Service]
Type=oneshot
WorkingDirectory=/payload
Environment=BRIG_TEST_SYSTEMD=1 BRIG_TEST_STRICT=1 BRIGANTINE_RUNTIME=$BRIGANTINE_RUNTIME PATH=$PATH
ExecStart=/bin/sh -c "$test --test-threads 1 systemd_itself >/payload/out/systemd.log 2>&1; echo \$\$? >/payload/out/systemd.status"
ExecStopPost=/bin/systemctl poweroff --force --force
EOF
    mkdir -p /sys/fs/cgroup/systemd
    # Nobody else may be in the group that systemd takes for the root: it hands controllers down from there.
    timeout 600 unshare --pid --fork --kill-child --mount --mount-proc sh -c '
        echo 0 >/sys/fs/cgroup/systemd/cgroup.procs &&
        exec unshare --cgroup sh -c "
            umount /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && mount -t tmpfs tmpfs /run &&
            exec env -i container=unshare PATH=$PATH /lib/systemd/systemd --system --unit=brig-tests.service \
                --log-target=console --log-level=warning"' </dev/null
    cat /payload/out/systemd.log
    grep -q "test systemd_itself_makes.* ok" /payload/out/systemd.log &&
        [ "$(cat /payload/out/systemd.status)" = 0 ]
}
for test in tests/oci_systemd-*; do
    [ -e "$test" ] || continue
    under_systemd "$test" || failed="$failed ${test#tests/}(systemd)"
done
echo "== failed:${failed:- none}"
[ -z "$failed" ]
