// How many threads this process should use: physical processors it may run on, within the
// container's quota.
#pragma once

#include <string>

namespace gpt2f {

struct CpuBudget {
  int cores;     // in the affinity mask; hardware threads of one core count once
  double quota;  // least CPU quota of every cgroup (v1 or v2) around this process, 0 for none
  int threads;   // the least of both, the quota rounded up; at least 1
};

// `root` is put before /proc and /sys, for tests.
CpuBudget cpu_budget(const std::string& root = "");

// Bytes this process may still take: what the system has available, within the cgroup's limit.
// 0 when unknown.
unsigned long long available_memory(const std::string& root = "");

}  // namespace gpt2f
