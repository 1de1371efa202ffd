// The one file that knows Python: numbers in, exceptions out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "chain.hpp"

namespace py = pybind11;

namespace {

using mpo::Level, mpo::Schedule;

void check(const mpo::Status& status) {
  if (status.ok()) return;
  if (status.code == mpo::Code::kInvalid) throw py::value_error(status.message);
  throw std::runtime_error(status.message);
}

template <class Enum>
Enum named(const char* what, const std::string& name,
           std::initializer_list<std::pair<const char*, Enum>> names) {
  std::string known;
  for (const auto& [candidate, value] : names) {
    if (name == candidate) return value;
    known += (known.empty() ? "" : ", ") + std::string(candidate);
  }
  throw py::value_error(std::string(what) + ": expected one of " + known + ", got " + name);
}

// Sizes and strides [bond_in, in, out, bond_out], and whether its address is divisible by 16.
using CoreArguments = std::tuple<std::array<int64_t, 4>, std::array<int64_t, 4>, bool>;

int narrow(const std::string& what, int64_t value) {
  if (value >= INT32_MIN && value <= INT32_MAX) return static_cast<int>(value);
  throw py::value_error(what + ": expected it below 2^31, got " + std::to_string(value));
}

class Chain {
 public:
  Chain(const std::vector<CoreArguments>& cores, int64_t rows, int64_t in_features,
        int64_t out_features, bool from_left, const std::string& element, const std::string& stored,
        const std::tuple<int, int, int>& limits) {
    problem_.rows = narrow("rows", rows);
    problem_.in_features = narrow("in_features", in_features);
    problem_.out_features = narrow("out_features", out_features);
    problem_.parts = static_cast<int>(cores.size());
    problem_.from_left = from_left;
    problem_.element = named<mpo::Element>(
        "element", element,
        {{"float16", mpo::Element::kFloat16}, {"bfloat16", mpo::Element::kBFloat16}});
    problem_.stored = named<mpo::Stored>("stored", stored,
                                         {{element.c_str(), mpo::Stored::kSame},
                                          {"float8_e4m3fn", mpo::Stored::kFloat8},
                                          {"int8", mpo::Stored::kInt8}});
    for (size_t k = 0; k < cores.size() && k < mpo::kMaxParts; ++k) {
      const auto& [sizes, strides, aligned] = cores[k];
      const std::string name = "core " + std::to_string(k);
      const auto size = [&, &of = sizes](size_t axis) { return narrow(name, of[axis]); };
      problem_.cores[k] = {size(1),    size(2),    size(0),    size(3), strides[0],
                           strides[1], strides[2], strides[3], aligned};
    }
    const auto& [architecture, multiprocessors, shared_memory] = limits;
    check(mpo::plan(problem_, {architecture, multiprocessors, shared_memory}, &schedule_));
  }

  void launch(uintptr_t x, int64_t x_row, int64_t x_column, const std::vector<uintptr_t>& cores,
              const std::vector<uintptr_t>& scales, uintptr_t bias, uintptr_t y, uintptr_t partials,
              uintptr_t counters, int device, uintptr_t stream) const {
    const size_t parts = static_cast<size_t>(schedule_.parts);
    if (cores.size() != parts || (!scales.empty() && scales.size() != parts - 1)) {
      throw py::value_error("cores, scales: expected " + std::to_string(parts) + " and " +
                            std::to_string(parts - 1) + " or 0, got " +
                            std::to_string(cores.size()) + " and " + std::to_string(scales.size()));
    }
    mpo::Operands operands = {};
    operands.x = reinterpret_cast<const void*>(x);
    operands.x_row = x_row, operands.x_column = x_column;
    for (size_t k = 0; k < parts; ++k) operands.cores[k] = reinterpret_cast<const void*>(cores[k]);
    for (size_t k = 0; k < scales.size(); ++k) {
      operands.scales[k] = reinterpret_cast<const float*>(scales[k]);
    }
    operands.bias = reinterpret_cast<const void*>(bias);
    operands.y = reinterpret_cast<void*>(y);
    operands.partials = reinterpret_cast<float*>(partials);
    operands.counters = reinterpret_cast<int*>(counters);
    check(mpo::launch(problem_, schedule_, operands, device, reinterpret_cast<void*>(stream)));
  }

  const Schedule& schedule() const { return schedule_; }

  std::string repr() const {
    const Schedule& s = schedule_;
    std::string text = std::to_string(s.tiles) + " × " + std::to_string(s.splits) + " blocks";
    if (s.cluster > 1) text += " in clusters of " + std::to_string(s.cluster);
    text += ":";
    for (int level = 0; level < s.parts; ++level) {
      const Level& l = s.levels[level];
      constexpr const char* kAccess[] = {"m", "k", "one at a time"};
      text += (level > 0 ? ", then [" : " [") + std::to_string(l.m_tile) + ", " +
              std::to_string(l.depth) + "] × " + std::to_string(l.columns) + " along " +
              kAccess[static_cast<int>(l.access)];
    }
    return text + ", " + std::to_string(s.shared_memory >> 10) + " KiB";
  }

 private:
  mpo::Problem problem_ = {};
  Schedule schedule_ = {};
};

}  // namespace

PYBIND11_MODULE(MPO_KERNELS_MODULE, module) {
  module.attr("INTERFACE") = mpo::kInterface;
  module.attr("SOURCES") = MPO_KERNELS_SOURCES;
  module.attr("MAX_ROWS") = mpo::kMaxRows;
  module.attr("MAX_PARTS") = mpo::kMaxParts;
  module.def("limits", [](int device) {
    mpo::Limits limits;
    check(mpo::limits_of_device(device, &limits));
    return std::make_tuple(limits.architecture, limits.multiprocessors, limits.shared_memory);
  });
  module.def("make_zeros", [](int device, int64_t count) {
    void* zeros = nullptr;
    check(mpo::make_zeros(device, count, &zeros));
    return reinterpret_cast<uintptr_t>(zeros);
  });
  module.def("is_capturing", [](uintptr_t stream) {
    bool capturing = false;
    check(mpo::is_capturing(reinterpret_cast<void*>(stream), &capturing));
    return capturing;
  });
  py::class_<Chain>(module, "Chain")
      .def(py::init<const std::vector<CoreArguments>&, int64_t, int64_t, int64_t, bool,
                    const std::string&, const std::string&, const std::tuple<int, int, int>&>(),
           py::arg("cores"), py::arg("rows"), py::arg("in_features"), py::arg("out_features"),
           py::arg("from_left"), py::arg("element"), py::arg("stored"), py::arg("limits"))
      .def("launch", &Chain::launch, py::arg("x"), py::arg("x_row"), py::arg("x_column"),
           py::arg("cores"), py::arg("scales"), py::arg("bias"), py::arg("y"), py::arg("partials"),
           py::arg("counters"), py::arg("device"), py::arg("stream"))
      .def("__repr__", &Chain::repr)
      .def_property_readonly("seconds", [](const Chain& c) { return c.schedule().seconds; })
      .def_property_readonly("tiles", [](const Chain& c) { return c.schedule().tiles; })
      .def_property_readonly("splits", [](const Chain& c) { return c.schedule().splits; })
      .def_property_readonly("partials", [](const Chain& c) { return c.schedule().partials(); })
      .def_property_readonly("counters", [](const Chain& c) { return c.schedule().counters(); })
      .def_property_readonly("shared_memory",
                             [](const Chain& c) { return c.schedule().shared_memory; });
}
