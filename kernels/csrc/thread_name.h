// Names that top -H, perf and debuggers show for the core's threads.
#pragma once

#include <pthread.h>

namespace mtrains {

// Of the calling thread; at most 15 characters.
inline void name_thread(const char* name) { pthread_setname_np(pthread_self(), name); }

}  // namespace mtrains
