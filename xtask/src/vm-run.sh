#!/bin/sh
# All tests that were brought along, in the machine. What a test needs is there: BRIG_TEST_STRICT makes it fail rather
# than pass over what it does not find.
export BRIG_TEST_DIST=/payload BRIGANTINE_RUNTIME=/payload/brig-runtime CARGO_TARGET_DIR=/payload/target
export BRIG_TEST_STRICT=1
failed=
if [ -e engine.sh ]; then
    echo "== the engine"
    sh ./engine.sh || failed="$failed engine"
fi
for test in tests/*; do
    [ -e "$test" ] || continue
    echo "== $test"
    "./$test" --test-threads 2 || failed="$failed ${test#tests/}"
done
echo "== failed:${failed:- none}"
[ -z "$failed" ]
