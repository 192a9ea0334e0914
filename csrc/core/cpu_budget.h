// How many threads this process should use: physical processors it may run on, within the container's
// quota.
#pragma once

namespace gpt2f {

// The least of: processors in the affinity mask (hardware threads of one core count once), the CPU
// quota of every cgroup (v1 or v2) this process is in, rounded up. At least 1.
int available_threads();

// Bytes this process may still take: what the system has available, within the cgroup's limit.
// 0 when unknown.
unsigned long long available_memory();

}  // namespace gpt2f
