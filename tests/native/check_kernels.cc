// Compares every set of kernels that this CPU can run with sums in double precision. Does not need JAX, so that it can
// also run under an emulator or with sanitizers.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

extern "C" void Grok1Pack(const uint8_t* box, int64_t stride, int64_t first_row, int64_t rows, int64_t first_column,
                          int64_t columns, uint8_t* packed, int64_t groups, int64_t group_rows);

namespace {

using namespace grok1;

int failures = 0;

void Expect(bool good, const Kernels& kernels, const char* what, const std::string& where) {
  if (good) return;
  ++failures;
  std::printf("%s: %s is wrong at %s\n", kernels.name, what, where.c_str());
}

uint16_t ToBfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

float FromBfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

void CheckProducts(const Kernels& kernels, int64_t rows, int64_t group_rows, int64_t columns, int64_t groups,
                   std::mt19937& random) {
  const int64_t inner = groups * group_rows;
  std::vector<int8_t> weight(inner * columns);
  for (int8_t& value : weight) value = static_cast<int8_t>(random());
  std::vector<uint16_t> scales(groups * columns);
  for (uint16_t& scale : scales) scale = ToBfloat16(0.01f + 0.0001f * static_cast<float>(random() % 100));
  std::vector<float> x(rows * inner);
  for (float& value : x) value = std::normal_distribution<float>(0, 3)(random);

  Matrix matrix = {nullptr, scales.data(), columns, groups, group_rows};
  const int64_t size = matrix.num_panels() * matrix.panel_bytes();
  std::vector<uint8_t> panels(size);
  const int64_t cut = inner / 3;  // two boxes, split at a row that may be inside a quad
  const auto* bytes = reinterpret_cast<const uint8_t*>(weight.data());
  Grok1Pack(bytes, columns, 0, cut, 0, columns, panels.data(), groups, group_rows);
  Grok1Pack(bytes + cut * columns, columns, cut, inner - cut, 0, columns, panels.data(), groups, group_rows);
  matrix.panels = panels.data();

  const int64_t row_bytes = kernels.row_bytes(matrix);
  std::vector<uint8_t> data(rows * row_bytes);  // exact size, so that the address sanitizer detects reads beyond it
  std::vector<float> step(rows);
  std::vector<double> bias(rows * groups);
  for (int64_t row = 0; row < rows; ++row)
    kernels.prepare(x.data() + row * inner, matrix, data.data() + row * row_bytes, &step[row], &bias[row * groups]);
  const int64_t width = matrix.num_panels() * kPanelColumns;
  std::vector<float> found(rows * width);
  kernels.multiply({rows, data.data(), step.data(), bias.data()}, matrix, 0, matrix.num_panels(), found.data(), width);

  for (int64_t row = 0; row < rows; ++row)
    for (int64_t n = 0; n < columns; ++n) {
      double expected = 0, bound = 1e-30;
      for (int64_t k = 0; k < inner; ++k) {
        const double term = static_cast<double>(x[row * inner + k]) * weight[k * columns + n] *
                            FromBfloat16(scales[k / group_rows * columns + n]);
        expected += term;
        bound += std::fabs(term);
      }
      Expect(std::fabs(found[row * width + n] - expected) <= 3e-6 * bound, kernels, "a product",
             std::to_string(rows) + " x " + std::to_string(groups) + " x " + std::to_string(group_rows) + " x " +
                 std::to_string(columns) + ", row " + std::to_string(row) + ", column " + std::to_string(n));
    }
}

void CheckGelu(const Kernels& kernels, int64_t count, std::mt19937& random) {
  std::vector<float> gate(count), value(count);
  for (float& g : gate) g = std::normal_distribution<float>(0, 4)(random);
  for (float& v : value) v = std::normal_distribution<float>(0, 1)(random);
  const std::vector<float> before = gate;
  kernels.gelu_product(gate.data(), value.data(), count);
  for (int64_t i = 0; i < count; ++i) {
    const double g = before[i];
    const double expected = 0.5 * g * (1 + std::tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))) * value[i];
    Expect(std::fabs(gate[i] - expected) <= 1e-6 + 1e-5 * std::fabs(expected), kernels, "gelu", std::to_string(i));
  }
}

void CheckAttention(const Kernels& kernels, int64_t queries, int64_t positions, int64_t size, bool bfloat16,
                    std::mt19937& random) {
  std::vector<float> query(queries * size), keys(positions * size), values(positions * size);
  for (auto* array : {&query, &keys, &values})
    for (float& value : *array) value = FromBfloat16(ToBfloat16(std::normal_distribution<float>(0, 1)(random)));
  std::vector<uint16_t> short_keys, short_values;
  for (const float key : keys) short_keys.push_back(ToBfloat16(key));
  for (const float value : values) short_values.push_back(ToBfloat16(value));
  std::vector<int32_t> counts(queries);
  for (int32_t& count : counts) count = static_cast<int32_t>(random() % (positions + 1));
  counts[0] = static_cast<int32_t>(positions);
  if (queries > 1) counts[1] = -1;
  std::vector<float> out(queries * size), mass(queries);
  AttentionTask task = {queries, query.data(), counts.data(), keys.data(), values.data(), bfloat16,
                        size,    0.3f,         30.0f,         out.data(),  mass.data()};
  if (bfloat16) task.keys = short_keys.data(), task.values = short_values.data();
  std::vector<float> scratch(task.scratch_floats());
  kernels.attend(task, scratch.data());
  for (int64_t i = 0; i < queries; ++i) {
    std::vector<double> expected(size);
    double total = 0;
    for (int64_t s = 0; s < counts[i]; ++s) {
      double logit = 0;
      for (int64_t d = 0; d < size; ++d) logit += static_cast<double>(query[i * size + d]) * keys[s * size + d];
      const double weight = std::exp(30 * std::tanh(logit * 0.3 / 30));
      total += weight;
      for (int64_t d = 0; d < size; ++d) expected[d] += weight * values[s * size + d];
    }
    for (int64_t d = 0; d < size; ++d) {
      const double wanted = total > 0 ? expected[d] / total : 0, got = mass[i] > 0 ? out[i * size + d] / mass[i] : 0;
      Expect(std::fabs(got - wanted) <= 1e-4, kernels, "attention",
             std::to_string(queries) + " x " + std::to_string(positions) + " x " + std::to_string(size));
    }
  }
}

void CheckTransposed(const Kernels& kernels, int64_t rows, int64_t entries, int64_t size, bool bfloat16,
                     std::mt19937& random) {
  std::vector<float> x(rows * size), table(entries * size), found(rows * entries), scratch(size);
  for (auto* array : {&x, &table})
    for (float& value : *array) value = FromBfloat16(ToBfloat16(std::normal_distribution<float>(0, 1)(random)));
  std::vector<uint16_t> short_table;
  for (const float value : table) short_table.push_back(ToBfloat16(value));
  const void* given = bfloat16 ? static_cast<const void*>(short_table.data()) : table.data();
  const int64_t cut = entries / 2;
  kernels.multiply_transposed(x.data(), rows, given, bfloat16, 0, cut, size, found.data(), entries, scratch.data());
  kernels.multiply_transposed(x.data(), rows, given, bfloat16, cut, entries - cut, size, found.data() + cut, entries,
                              scratch.data());
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t n = 0; n < entries; ++n) {
      double expected = 0;
      for (int64_t d = 0; d < size; ++d) expected += static_cast<double>(x[row * size + d]) * table[n * size + d];
      Expect(std::fabs(found[row * entries + n] - expected) <= 1e-5 * static_cast<double>(size), kernels,
             "a transposed product",
             std::to_string(rows) + " x " + std::to_string(entries) + " x " + std::to_string(size));
    }
}

}  // namespace

int main() {
  for (const Kernels* const* each = AllKernels(); *each; ++each) {
    const Kernels& kernels = **each;
    std::mt19937 random(1);
    for (const int64_t rows : {1, 2, 3, 8, 17, 43})
      for (const auto& [group_rows, columns, groups] :
           {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1}, {5, 17, 3}, {64, 64, 1}, {70, 33, 2}, {200, 70, 2}})
        CheckProducts(kernels, rows, group_rows, columns, groups, random);
    for (const int64_t count : {1, 15, 16, 100}) CheckGelu(kernels, count, random);
    for (const int64_t queries : {1, 2, 7, 8, 13, 64})
      for (const int64_t positions : {1, 63, 64, 200})
        for (const int64_t size : {2, 64, 70, 128})
          for (const bool bfloat16 : {false, true}) CheckAttention(kernels, queries, positions, size, bfloat16, random);
    for (const int64_t rows : {1, 4, 7})
      for (const int64_t size : {1, 16, 75, 128})
        for (const bool bfloat16 : {false, true}) CheckTransposed(kernels, rows, 9, size, bfloat16, random);
    std::printf("%s: checked\n", kernels.name);
  }
  return failures != 0;
}
