// The one file that knows Python: numbers in, exceptions out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "thin.hpp"

namespace py = pybind11;

namespace {

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

// The attribute of that name, within the range of its field.
template <class Integer>
void read(const py::handle& from, const char* name, Integer* to) {
  const auto value = from.attr(name).cast<int64_t>();
  *to = static_cast<Integer>(value);
  if (*to == value) return;
  throw py::value_error(std::string(name) + ": expected it below 2^31, got " +
                        std::to_string(value));
}

mpo::Product product_of(const py::handle& from) {
  mpo::Product p = {};
  for (const auto& [name, to] : {std::pair{"m", &p.m},
                                 {"k", &p.k},
                                 {"columns", &p.columns},
                                 {"c1", &p.c1},
                                 {"c2", &p.c2},
                                 {"m_minor", &p.m_minor},
                                 {"weight_major", &p.weight_major},
                                 {"weight_minor", &p.weight_minor},
                                 {"state_c0", &p.state_c0},
                                 {"state_c1", &p.state_c1},
                                 {"state_c2", &p.state_c2},
                                 {"state_k", &p.state_k},
                                 {"out_c0", &p.out_c0},
                                 {"out_c1", &p.out_c1},
                                 {"out_c2", &p.out_c2},
                                 {"out_major", &p.out_major},
                                 {"out_minor", &p.out_minor},
                                 {"state_limit", &p.state_limit},
                                 {"out_limit", &p.out_limit},
                                 {"shares", &p.shares},
                                 {"splits", &p.splits},
                                 {"groups", &p.groups},
                                 {"column_tiles", &p.column_tiles},
                                 {"warps_k", &p.warps_k},
                                 {"steps", &p.steps}}) {
    read(from, name, to);
  }
  read(from, "state_share", &p.state_share);
  read(from, "out_share", &p.out_share);
  return p;
}

class Chain {
 public:
  Chain(const std::vector<py::object>& products, const std::vector<int64_t>& offsets,
        int64_t out_features, const std::string& element, const std::string& stored,
        bool programmatic) {
    if (products.empty() || products.size() > mpo::kMaxParts || offsets.size() != products.size()) {
      throw py::value_error("products, offsets: expected 1 to 3, and as many, got " +
                            std::to_string(products.size()) + " and " +
                            std::to_string(offsets.size()));
    }
    chain_.parts = static_cast<int>(products.size());
    for (size_t k = 0; k < products.size(); ++k) {
      chain_.products[k] = product_of(products[k]);
      chain_.offsets[k] = offsets[k];
    }
    chain_.out_features = static_cast<int>(out_features);
    chain_.element = named<mpo::Element>(
        "element", element,
        {{"float16", mpo::Element::kFloat16}, {"bfloat16", mpo::Element::kBFloat16}});
    chain_.stored = named<mpo::Stored>("stored", stored,
                                       {{element.c_str(), mpo::Stored::kSame},
                                        {"float8_e4m3fn", mpo::Stored::kFloat8},
                                        {"int8", mpo::Stored::kInt8}});
    chain_.programmatic = programmatic;
    check(mpo::check(chain_));
  }

  void launch(uintptr_t x, int x_row, const std::vector<uintptr_t>& cores,
              const std::vector<uintptr_t>& scales, uintptr_t bias, uintptr_t y,
              uintptr_t workspace, bool early, int device, uintptr_t stream) const {
    const size_t parts = static_cast<size_t>(chain_.parts);
    if (cores.size() != parts || (!scales.empty() && scales.size() != parts - 1)) {
      throw py::value_error("cores, scales: expected " + std::to_string(parts) + " and " +
                            std::to_string(parts - 1) + " or 0, got " +
                            std::to_string(cores.size()) + " and " + std::to_string(scales.size()));
    }
    mpo::Operands operands = {};
    operands.x = reinterpret_cast<const void*>(x);
    operands.x_row = x_row;
    for (size_t k = 0; k < parts; ++k) operands.cores[k] = reinterpret_cast<const void*>(cores[k]);
    for (size_t k = 0; k < scales.size(); ++k) {
      operands.scales[k] = reinterpret_cast<const float*>(scales[k]);
    }
    operands.bias = reinterpret_cast<const void*>(bias);
    operands.y = reinterpret_cast<void*>(y);
    operands.workspace = reinterpret_cast<char*>(workspace);
    operands.early = early;
    check(mpo::check(chain_, operands));
    check(mpo::launch(chain_, operands, device, reinterpret_cast<void*>(stream)));
  }

 private:
  mpo::Chain chain_ = {};
};

}  // namespace

PYBIND11_MODULE(MPO_KERNELS_MODULE, module) {
  module.attr("INTERFACE") = mpo::kInterface;
  module.attr("SOURCES") = MPO_KERNELS_SOURCES;
  module.def("limits", [](int device) {
    int architecture = 0, multiprocessors = 0;
    check(mpo::limits_of_device(device, &architecture, &multiprocessors));
    return std::make_tuple(architecture, multiprocessors);
  });
  py::class_<Chain>(module, "Chain")
      .def(py::init<const std::vector<py::object>&, const std::vector<int64_t>&, int64_t,
                    const std::string&, const std::string&, bool>(),
           py::arg("products"), py::arg("offsets"), py::arg("out_features"), py::arg("element"),
           py::arg("stored"), py::arg("programmatic"))
      .def("launch", &Chain::launch, py::arg("x"), py::arg("x_row"), py::arg("cores"),
           py::arg("scales"), py::arg("bias"), py::arg("y"), py::arg("workspace"), py::arg("early"),
           py::arg("device"), py::arg("stream"));
}
