#!/bin/bash
# Tells Ray that this spot node is about to go, once the cloud says so: `drain_on_notice.sh HEAD:6379 [SECONDS]`.
# Ray Train then starts the workers anew elsewhere, and does not count it against run.max_failures.
# NOTICE is the command that succeeds when the notice is there; by default AWS's, which comes 120 s before the end.
set -u
metadata=http://169.254.169.254/latest
aws_notice() {
  local token
  token=$(wget -qO- --method=PUT --header="X-aws-ec2-metadata-token-ttl-seconds: 60" "$metadata/api/token") &&
    wget -qO- --header="X-aws-ec2-metadata-token: $token" "$metadata/meta-data/spot/instance-action" >/dev/null
}
until ${NOTICE:-aws_notice}; do sleep 5; done
exec ray drain-node --address "$1" ${NODE_ID:+--node-id "$NODE_ID"} --reason DRAIN_NODE_REASON_PREEMPTION \
  --reason-message "spot notice" --deadline-remaining-seconds "${2:-100}"
