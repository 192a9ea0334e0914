// pack of int8 and int4 matrices into the order of quantized.inl.h.
//
// Work     panels of 16 outputs are split over the lanes.
// Traffic  the source once, the packed matrix once; one panel's rows in between, 80 K bytes.
// Numerics integers and scales are those of engine/quantize.h.
#include <cstring>
#include <vector>

#include "cpu/isa.h"
#include "engine/quantize.h"

namespace gpt2f {
namespace {

// Where the parts of one panel lie, in bytes.
struct Panel {
  uint8_t* first;  // of its first step
  int64_t step;  // from one step to the next
  uint8_t* first_scales;
};

Panel panel_at(const PackArgs& a, int64_t panel, int64_t steps) {
  const int64_t integers = a.precision == Precision::kInt8 ? kInt8Group * 16 : kInt4Group * 8;
  const int64_t group = panel / kGroupPanels * kGroupPanels;
  const int64_t left = a.linear.panels() - group,
                beside = left < kGroupPanels ? left : kGroupPanels;
  uint8_t* const words = reinterpret_cast<uint8_t*>(a.linear.words);
  uint8_t* const start = words + group * steps * (integers + 2 * kLanes);
  return {start + (panel - group) * integers, beside * (integers + 2 * kLanes),
          start + beside * integers + (panel - group) * 2 * kLanes};
}

void write_integer(Precision p, uint8_t* group, int64_t output, int64_t k, int value) {
  if (p == Precision::kInt8) {
    group[k / 4 * 64 + output * 4 + k % 4] = static_cast<uint8_t>(value + 128);
  } else {
    uint8_t& byte = group[k / 8 * 64 + output * 4 + k % 4];
    byte = static_cast<uint8_t>(byte | (value + 8) << (k % 8 < 4 ? 0 : 4));
  }
}

}  // namespace

void pack_quantized(const PackArgs& a, const Lane& lane) {
  const int64_t padded = round_up(a.linear.inputs, 64), size = group_size(a.precision);
  const int64_t steps = padded / size;
  std::vector<float> rows(static_cast<size_t>(kLanes * padded));
  std::vector<int8_t> q(static_cast<size_t>(padded));
  std::vector<uint16_t> scales(static_cast<size_t>(steps));
  const Range mine = share(a.linear.panels(), 1, lane);
  for (int64_t index = mine.begin; index < mine.end; ++index) {
    const Panel panel = panel_at(a, index, steps);
    const int64_t integers = size * (a.precision == Precision::kInt8 ? 16 : 8);
    for (int64_t s = 0; s < steps; ++s) {
      std::memset(panel.first + s * panel.step, 0, static_cast<size_t>(integers));
    }
    read_tile(a, index * kLanes, rows.data());
    for (int64_t output = 0; output < kLanes; ++output) {
      quantize_row(a.precision, rows.data() + output * padded, padded, q.data(), scales.data());
      for (int64_t k = 0; k < padded; ++k) {
        write_integer(a.precision, panel.first + k / size * panel.step, output, k % size,
                      q[static_cast<size_t>(k)]);
      }
      for (int64_t s = 0; s < steps; ++s) {
        std::memcpy(panel.first_scales + s * panel.step + output * 2,
                    &scales[static_cast<size_t>(s)], sizeof(uint16_t));
      }
    }
  }
}

}  // namespace gpt2f
