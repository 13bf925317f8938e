// How many cores this process may use.
#pragma once

namespace mixbit {

// Physical cores in the affinity mask, bounded by a cgroup's CPU quota; at least 1.
int usable_cores();

}  // namespace mixbit
