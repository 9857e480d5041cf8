// Numbers that a captured graph was given by the host, which change from launch to launch: addresses of what it reads and writes, a learning
// rate, the number of a step.
//
// A graph has the parameters of its kernels as they were when it was captured. Two captures of the same launches, with the same memory between
// them but with other numbers, show where those are: where the two differ, in words that are as wide as the number and begin at a
// multiple of that. So whatever else differs, and whatever depends on a number in another way than by being it, is found, and refused.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "device_calls.h"

namespace mtrains {

// The addresses of the CUDA driver's cuGraphGetNodes, cuGraphNodeGetType, cuGraphKernelNodeGetParams_v2, cuGraphExecKernelNodeSetParams_v2 and
// cuFuncGetParamInfo.
struct GraphFunctions {
  Handle get_nodes, get_type, get_params, set_params, param_info;
};

class GraphNumbers {
 public:
  // ``graph`` stays as it is, and lives as long as this does. ``numbers``: the bytes of each as ``graph`` was captured with, ``others``: as
  // ``other`` was. Throws kConfiguration where the graphs differ in anything else, or a number is nowhere; kDevice for what the driver reports.
  GraphNumbers(const GraphFunctions& functions, Handle graph, Handle other, const std::vector<std::string>& numbers,
               const std::vector<std::string>& others);

  // The next launches of ``executable``, made from ``graph``, have these numbers. Throws kDevice.
  void set(Handle executable, const std::vector<std::string>& numbers);

  // In how many places each number is.
  std::vector<int> places() const;

 private:
  struct Place {
    std::size_t parameter, offset, number;
  };
  struct Kernel {
    Handle node;
    std::vector<unsigned char> launch;        // the driver's description of it
    std::vector<std::string> parameters;
    std::vector<void*> addresses;             // of parameters
    std::vector<Place> places;
  };

  void find(const std::string& mine, const std::string& theirs, const std::vector<std::string>& others, std::size_t parameter,
            std::vector<Place>& places) const;
  std::vector<Handle> nodes_of(Handle graph) const;
  bool is_kernel(Handle node) const;
  Kernel kernel_at(Handle node) const;

  GraphFunctions functions_;
  std::vector<std::string> numbers_;
  std::vector<Kernel> kernels_;  // that have a number
};

}  // namespace mtrains
