#include "graph_numbers.h"

#include <algorithm>
#include <cstring>

#include "errors.h"

namespace mtrains {
namespace {

constexpr int kSuccess = 0, kKernelNode = 0, kMemsetNode = 2, kEmptyNode = 5;

// The driver's CUDA_KERNEL_NODE_PARAMS_v2.
struct Launch {
  void* function;
  unsigned grid[3], block[3], shared_bytes;
  void** parameters;
  void** extra;
  void* kernel;
  void* context;
};

template <typename... Arguments>
int call(Handle function, Arguments... arguments) {
  return reinterpret_cast<int (*)(Arguments...)>(function)(arguments...);
}

void* pointer(Handle handle) { return reinterpret_cast<void*>(handle); }

void check(int status, const char* function) {
  if (status != kSuccess) throw Error(ErrorKind::kDevice, std::string(function) + " failed with CUDA error " + std::to_string(status));
}

bool same_launch(const void* a, const void* b) {
  Launch x, y;
  std::memcpy(&x, a, sizeof x);
  std::memcpy(&y, b, sizeof y);
  return x.function == y.function && std::equal(x.grid, x.grid + 3, y.grid) && std::equal(x.block, x.block + 3, y.block) &&
         x.shared_bytes == y.shared_bytes;
}

[[noreturn]] void refuse(const std::string& why) {
  throw Error(ErrorKind::kConfiguration, "two captures of one sequence of launches " + why + "; it cannot be replayed with other numbers");
}

}  // namespace

GraphNumbers::GraphNumbers(const GraphFunctions& functions, Handle graph, Handle other, const std::vector<std::string>& numbers,
                           const std::vector<std::string>& others)
    : functions_(functions), numbers_(numbers) {
  for (Handle f : {functions.get_nodes, functions.get_type, functions.get_params, functions.set_params, functions.param_info}) {
    if (f == 0) throw Error(ErrorKind::kConfiguration, "a function of the CUDA driver has address 0");
  }
  for (std::size_t n = 0; n < std::max(numbers.size(), others.size()); ++n) {
    if (n >= numbers.size() || n >= others.size() || numbers[n].empty() || numbers[n].size() != others[n].size() || numbers[n] == others[n]) {
      throw Error(ErrorKind::kConfiguration, "two captures have as many numbers, of the same widths, which differ");
    }
  }
  const std::vector<Handle> mine = nodes_of(graph), theirs = nodes_of(other);
  if (mine.size() != theirs.size()) refuse("have " + std::to_string(mine.size()) + " and " + std::to_string(theirs.size()) + " nodes");
  for (std::size_t i = 0; i < mine.size(); ++i) {
    const bool kernel = is_kernel(mine[i]);
    if (kernel != is_kernel(theirs[i])) refuse("differ in the kind of node " + std::to_string(i));
    if (!kernel) continue;
    Kernel a = kernel_at(mine[i]);
    const Kernel b = kernel_at(theirs[i]);
    if (!same_launch(a.launch.data(), b.launch.data()) || a.parameters.size() != b.parameters.size()) {
      refuse("launch node " + std::to_string(i) + " in different ways");
    }
    for (std::size_t p = 0; p < a.parameters.size(); ++p) find(a.parameters[p], b.parameters[p], others, p, a.places);
    if (!a.places.empty()) kernels_.push_back(std::move(a));
  }
  const std::vector<int> found = places();
  for (std::size_t n = 0; n < found.size(); ++n) {
    if (found[n] == 0) refuse("do not show where number " + std::to_string(n) + " is");
  }
}

void GraphNumbers::find(const std::string& mine, const std::string& theirs, const std::vector<std::string>& others, std::size_t parameter,
                        std::vector<Place>& places) const {
  if (mine.size() != theirs.size()) refuse("have a kernel with parameters of different widths");
  for (std::size_t at = 0; at < mine.size();) {
    if (mine[at] == theirs[at]) {
      ++at;
      continue;
    }
    std::size_t n = 0, begin = 0, width = 0;
    for (; n < numbers_.size(); ++n) {
      width = numbers_[n].size();
      begin = at / width * width;
      if (mine.compare(begin, width, numbers_[n]) == 0 && theirs.compare(begin, width, others[n]) == 0) break;
    }
    if (n == numbers_.size()) refuse("differ in parameter " + std::to_string(parameter) + " of a kernel, and not in a number");
    places.push_back({parameter, begin, n});
    at = begin + width;
  }
}

std::vector<Handle> GraphNumbers::nodes_of(Handle graph) const {
  std::size_t count = 0;
  check(call(functions_.get_nodes, pointer(graph), static_cast<void*>(nullptr), &count), "cuGraphGetNodes");
  std::vector<Handle> nodes(count);
  if (count > 0) check(call(functions_.get_nodes, pointer(graph), static_cast<void*>(nodes.data()), &count), "cuGraphGetNodes");
  return nodes;
}

bool GraphNumbers::is_kernel(Handle node) const {
  int type = 0;
  check(call(functions_.get_type, pointer(node), &type), "cuGraphNodeGetType");
  // Whatever else there may be, such as a copy out of the host's memory, may have got a number in another way.
  if (type != kKernelNode && type != kMemsetNode && type != kEmptyNode) refuse("have a node of kind " + std::to_string(type));
  return type == kKernelNode;
}

GraphNumbers::Kernel GraphNumbers::kernel_at(Handle node) const {
  Launch launch{};
  check(call(functions_.get_params, pointer(node), &launch), "cuGraphKernelNodeGetParams");
  if (launch.parameters == nullptr || launch.function == nullptr) refuse("have a kernel whose parameters are not known");
  Kernel kernel{node, std::vector<unsigned char>(sizeof(Launch)), {}, {}, {}};
  std::memcpy(kernel.launch.data(), &launch, sizeof(Launch));
  std::size_t offset = 0, bytes = 0;
  for (std::size_t p = 0; call(functions_.param_info, launch.function, p, &offset, &bytes) == kSuccess; ++p) {
    kernel.parameters.emplace_back(static_cast<const char*>(launch.parameters[p]), bytes);
  }
  return kernel;
}

void GraphNumbers::set(Handle executable, const std::vector<std::string>& numbers) {
  if (numbers == numbers_) return;
  if (numbers.size() != numbers_.size()) throw Error(ErrorKind::kConfiguration, "as many numbers as the graph has");
  for (std::size_t n = 0; n < numbers.size(); ++n) {
    if (numbers[n].size() != numbers_[n].size()) throw Error(ErrorKind::kConfiguration, "a number of another width");
  }
  for (Kernel& kernel : kernels_) {
    if (std::none_of(kernel.places.begin(), kernel.places.end(),
                     [&](const Place& place) { return numbers[place.number] != numbers_[place.number]; })) {
      continue;
    }
    for (const Place& place : kernel.places) kernel.parameters[place.parameter].replace(place.offset, numbers[place.number].size(), numbers[place.number]);
    kernel.addresses.clear();
    for (std::string& p : kernel.parameters) kernel.addresses.push_back(p.data());
    Launch launch;
    std::memcpy(&launch, kernel.launch.data(), sizeof(Launch));
    launch.parameters = kernel.addresses.data();
    check(call(functions_.set_params, pointer(executable), pointer(kernel.node), &launch), "cuGraphExecKernelNodeSetParams");
  }
  numbers_ = numbers;
}

std::vector<int> GraphNumbers::places() const {
  std::vector<int> count(numbers_.size());
  for (const Kernel& kernel : kernels_) {
    for (const Place& place : kernel.places) ++count[place.number];
  }
  return count;
}

}  // namespace mtrains
