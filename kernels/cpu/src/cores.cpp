#include "cores.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>
#include <string>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

namespace mixbit {
namespace {

#ifdef __linux__
// Hyper-threads of one core share its arithmetic units: each set of siblings counts once.
int affinity_cores() {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  if (sched_getaffinity(0, sizeof mask, &mask) != 0) return 0;
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &mask)) continue;
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
    std::string siblings;
    if (!std::getline(file, siblings)) siblings = "cpu " + std::to_string(cpu);
    cores.insert(siblings);
  }
  return static_cast<int>(cores.size());
}

int quota_cores() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  double quota = 0, period = 0;
  if (!(file >> quota >> period) || period <= 0) return 0;  // "max": no quota
  return std::max(1, static_cast<int>(std::ceil(quota / period)));
}
#else
int affinity_cores() { return static_cast<int>(std::thread::hardware_concurrency()); }
int quota_cores() { return 0; }
#endif

}  // namespace

int usable_cores() {
  int cores = std::max(1, affinity_cores());
  int quota = quota_cores();
  return quota > 0 ? std::min(cores, quota) : cores;
}

}  // namespace mixbit
