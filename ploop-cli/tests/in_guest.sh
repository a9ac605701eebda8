#!/bin/bash
# The tests of mounted disks in a virtual machine: a stock kernel, every capability, nothing of this host.
#
#   in_guest.sh [NAME...]      tests whose names hold one of NAME; all without
#
# GUEST is a program that runs a command as root in a throw-away machine, called as
#   $GUEST --disk SIZE --timeout SECONDS CACHE SHARE -- COMMAND
# where SHARE appears as /share and the disk as /dev/lab/disk0. Without GUEST nothing is tested, and it says so.
# The test program knows where `ploop` was built, so the workspace is bound to its own path inside.
set -euo pipefail

if [ -z "${GUEST:-}" ]; then
  echo "SKIP: GUEST names no program that runs a command in a virtual machine (see ${0##*/})"
  exit 0
fi
workspace=$(cd "$(dirname "$0")/../.." && pwd)
cd "$workspace"
program=$(cargo test --package ploop-cli --test serving --no-run 2>&1 | sed -n 's|.*Executable.*(\(.*\))$|\1|p')
[ -x "$program" ] || { echo "cannot build the tests of mounted disks" >&2; exit 1; }
mkdir -p target/guest
cat >target/guest/run.sh <<INSIDE
set -e
modprobe -a fuse loop xfs
mkfs.ext4 -q /dev/lab/disk0
mkdir -p /mnt/scratch "$workspace"
mount /dev/lab/disk0 /mnt/scratch
mkdir /mnt/scratch/tmp
export TMPDIR=/mnt/scratch/tmp RUST_BACKTRACE=1
# The shared folder is slow, and a program that runs from it has its pages there.
cp "/share/$program" /mnt/scratch/tests
cp /share/target/debug/ploop /mnt/scratch/ploop
mount --bind /share "$workspace"
mount --bind /mnt/scratch/ploop "$workspace/target/debug/ploop"
cd "$workspace/ploop-cli"
/mnt/scratch/tests --test-threads=1 "\$@"
INSIDE
"$GUEST" --disk 8G --timeout "${GUEST_SECONDS_MAX:-1800}" target/guest/cache "$workspace" -- \
  bash /share/target/guest/run.sh "$@"
