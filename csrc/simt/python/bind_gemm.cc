// The op linear of csrc/cuda over numpy arrays, and where the gemm's lanes reach into shared
// memory.
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cuda/gemm_tiles.cuh"
#include "cuda/kernels.h"
#include "simt/python/arrays.h"
#include "simt/python/bindings.h"

namespace py = pybind11;

namespace gpt2f::simt {
namespace {

// x (rows, K), weight (N, K); bias and residual may be None. Written to `out` (rows, N).
void linear(const std::string& type, const py::array& x, const py::array& weight,
            const py::object& bias, const py::object& residual, bool gelu, const py::array& out) {
  const int64_t rows = x.shape(0), inputs = x.shape(1), outputs = weight.shape(0);
  const int64_t padded = cuda::padded_inputs(inputs);
  std::vector<uint16_t> operand(static_cast<size_t>(rows * padded), 0xFFFF);
  std::vector<uint32_t> packed(static_cast<size_t>(cuda::tiles(outputs) * 16 * padded / 2), ~0u);
  LinearArgs args{};
  args.type = type == "bf16" ? DType::kBF16 : DType::kF16;
  args.x = data<uint16_t>(x);
  args.weight = data<uint16_t>(weight);
  args.bias = data<float>(bias);
  args.residual = data<uint16_t>(residual);
  args.gelu = gelu;
  args.out = data<uint16_t>(out);
  args.rows = rows;
  args.inputs = inputs;
  args.outputs = outputs;
  args.operand = operand.data();
  args.packed = packed.data();
  cuda::linear(args, {});
}

// Byte addresses in shared memory, 32 lanes to an instruction, of one kind of access of a block.
using Accesses = std::vector<std::vector<int>>;

template <typename At>
void add_warp(Accesses& to, const At& at) {
  std::vector<int> lanes;
  for (int lane = 0; lane < 32; ++lane) lanes.push_back(at(lane));
  to.push_back(lanes);
}

template <typename Tile>
py::dict accesses_of() {
  Accesses written, read, sums_written, sums_read;
  for (int warp = 0; warp < Tile::kWarps; ++warp) {
    for (int turn = 0; turn < Tile::kTokens * cuda::kRowUnits / Tile::kThreads; ++turn) {
      add_warp(written, [&](int lane) {
        const int thread = 32 * warp + lane;
        const int row = cuda::copied_row(thread, Tile::kThreads, turn);
        return 16 * cuda::row_unit(row, cuda::copied_unit(thread));
      });
    }
  }
  for (int row = 0; row < Tile::kTokens; row += 8) {
    for (int block = 0; block < 2; ++block) {
      add_warp(read, [&](int lane) {
        return 16 * (row * cuda::kRowUnits + cuda::lane_unit(lane, block));
      });
    }
  }
  for (int i = 0; i < Tile::kTokens / 8 * Tile::kTiles * 4; ++i) {
    const int tile = i / 4 % Tile::kTiles, tokens = i / 4 / Tile::kTiles;
    add_warp(sums_written, [&](int lane) { return 4 * Tile::sum_at(lane, tile, tokens, i % 4); });
  }
  for (int i = 0; i < Tile::kTokens * Tile::kOutputs / 32; ++i) {
    const int row = i * 32 / Tile::kOutputs, column = i * 32 % Tile::kOutputs;
    add_warp(sums_read, [&](int lane) { return 4 * (row * Tile::kPitch + column + lane); });
  }
  py::dict out;
  out["rows"] = Tile::kTokens;
  out["outputs"] = Tile::kOutputs;
  out["sum_bytes"] = Tile::kSumBytes;
  out["written"] = py::cast(written);
  out["read"] = py::cast(read);
  out["sums_written"] = py::cast(sums_written);
  out["sums_read"] = py::cast(sums_read);
  return out;
}

py::dict gemm_accesses(const std::string& tile) {
  return tile == "large" ? accesses_of<cuda::LargeTile>() : accesses_of<cuda::SmallTile>();
}

}  // namespace

void bind_gemm(py::module_& m) {
  m.def("linear", linear);
  m.def("gemm_accesses", gemm_accesses);
}

}  // namespace gpt2f::simt
