#include "core/cpu_budget.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace gpt2f {
namespace {

// First processor of the core that `cpu` belongs to, or itself.
int core_of(int cpu) {
  std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                     "/topology/thread_siblings_list");
  int first = cpu;
  return file >> first ? first : cpu;
}

int affine_cores() {
  // Machines may have more processors than the fixed-size mask holds: grow until it fits.
  for (int bits = 1024; bits <= 1 << 18; bits *= 4) {
    cpu_set_t* const mask = CPU_ALLOC(bits);
    if (mask == nullptr) break;
    const size_t size = CPU_ALLOC_SIZE(bits);
    CPU_ZERO_S(size, mask);
    const bool known = sched_getaffinity(0, size, mask) == 0;
    std::set<int> cores;
    for (int cpu = 0; known && cpu < bits; ++cpu) {
      if (CPU_ISSET_S(cpu, size, mask)) cores.insert(core_of(cpu));
    }
    CPU_FREE(mask);
    if (known) return std::max<int>(1, static_cast<int>(cores.size()));
  }
  return std::max(1u, std::thread::hardware_concurrency());
}

struct Groups {
  std::string unified;                                       // cgroup v2 path
  std::string cpu = "/", memory = "/";                       // cgroup v1 paths
};

Groups read_groups(const std::string& root) {
  Groups groups;
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::string controllers = ",";
    controllers.append(line, first + 1, second - first - 1).append(",");
    const std::string path = line.substr(second + 1);
    if (controllers == ",,") groups.unified = path;
    if (controllers.find(",cpu,") != std::string::npos) groups.cpu = path;
    if (controllers.find(",memory,") != std::string::npos) groups.memory = path;
  }
  return groups;
}

// `root` + path and all its parents, the innermost first; inside a container only the root may
// exist.
std::vector<std::string> ancestors(const std::string& root, std::string path) {
  std::vector<std::string> out;
  while (path.size() > 1) {
    out.push_back(root + path);
    path.resize(std::max<size_t>(path.rfind('/'), 0));
  }
  out.push_back(root);
  return out;
}

// Processors' worth of time per period, the least of all limits around; 0 when there is none.
double quota_of(const std::string& root) {
  const Groups groups = read_groups(root);
  double least = 1e9;
  for (const std::string& folder : ancestors(root + "/sys/fs/cgroup", groups.unified)) {
    std::ifstream file(folder + "/cpu.max");
    std::string quota;
    double period = 0;
    if (file >> quota >> period && quota != "max" && period > 0) {
      const double given = std::strtod(quota.c_str(), nullptr);
      if (given > 0) least = std::min(least, given / period);
    }
  }
  for (const char* tree : {"/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"}) {
    for (const std::string& folder : ancestors(root + tree, groups.cpu)) {
      std::ifstream quota_file(folder + "/cpu.cfs_quota_us");
      std::ifstream period_file(folder + "/cpu.cfs_period_us");
      double quota = 0, period = 0;
      if (quota_file >> quota && period_file >> period && quota > 0 && period > 0) {
        least = std::min(least, quota / period);
      }
    }
  }
  return least < 1e9 ? least : 0;
}

unsigned long long read_number(const std::string& path) {
  std::ifstream file(path);
  unsigned long long value = 0;
  return file >> value ? value : 0;  // "max" reads as 0
}

void limit(unsigned long long& least, const std::string& folder, const char* max_name,
           const char* used_name) {
  const unsigned long long most = read_number(folder + "/" + max_name);
  const unsigned long long used = read_number(folder + "/" + used_name);
  if (most > 0 && most < 1ull << 60) least = std::min(least, most > used ? most - used : 0);
}

}  // namespace

CpuBudget cpu_budget(const std::string& root) {
  const int cores = affine_cores();
  const double quota = quota_of(root);
  const double threads = quota > 0 ? std::min<double>(cores, std::ceil(quota)) : cores;
  return {cores, quota, std::max(1, static_cast<int>(threads))};
}

unsigned long long available_memory(const std::string& root) {
  unsigned long long least = ~0ull;
  std::ifstream file(root + "/proc/meminfo");
  std::string name;
  unsigned long long kib = 0;
  for (std::string line; std::getline(file, line);) {
    if (std::istringstream(line) >> name >> kib && name == "MemAvailable:") least = kib * 1024;
  }
  if (least == ~0ull) return 0;
  const Groups groups = read_groups(root);
  for (const std::string& folder : ancestors(root + "/sys/fs/cgroup", groups.unified)) {
    limit(least, folder, "memory.max", "memory.current");
  }
  for (const std::string& folder : ancestors(root + "/sys/fs/cgroup/memory", groups.memory)) {
    limit(least, folder, "memory.limit_in_bytes", "memory.usage_in_bytes");
  }
  return least;
}

}  // namespace gpt2f
