#!/bin/bash
# Waits for the preemption notice of this spot node, then drains the node: `drain_on_notice.sh HEAD:6379 [SECONDS]`.
# Ray Train restarts the workers on other nodes and does not count this against run.max_failures.
# NOTICE is a command that succeeds once there is a notice. The default is AWS's, given 120 s before the end.
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
