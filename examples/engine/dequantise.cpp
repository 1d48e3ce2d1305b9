#include "dequantise.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <bit>
#include <compresskv/core/half.hpp>
#include <cstring>

// Every product below is exact in float32: a half scale has 11 significant bits, a block's own scale at most
// 6 and a quantised number at most 6, and 11 + 6 + 6 < 24 (Q6_K: 11 + 7 + 5, as its scale and number are
// signed). So contracting a multiply and an add into one instruction cannot change a bit, and neither can the
// compiler.

namespace engine {
namespace {

using Byte = std::uint8_t;

float half_at(const Byte* bytes) {
  std::uint16_t bits;
  std::memcpy(&bits, bytes, sizeof bits);
  return static_cast<float>(std::bit_cast<compresskv::half>(bits));
}

std::uint32_t word_at(const Byte* bytes) {
  std::uint32_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

float real(int value) { return static_cast<float>(value); }
int signed_byte(Byte value) { return std::bit_cast<std::int8_t>(value); }

void decode_f32(const Byte* block, float* out) { std::memcpy(out, block, sizeof *out); }

void decode_f16(const Byte* block, float* out) { *out = half_at(block); }

void decode_bf16(const Byte* block, float* out) {
  std::uint16_t high;
  std::memcpy(&high, block, sizeof high);
  *out = std::bit_cast<float>(std::uint32_t{high} << 16U);
}

// | half d | 32 signed bytes |
void decode_q8_0(const Byte* block, float* out) {
  const float d = half_at(block);
  for (int i = 0; i < 32; ++i) out[i] = d * real(signed_byte(block[2 + i]));
}

// The four types with 32 numbers a block: low nibbles are the first 16 numbers, high nibbles the last 16;
// types of five bits keep the fifth of number i in bit i of a 32-bit word.
struct Fields {
  bool minimum;    // a half m follows d: value = d * q + m, else value = d * (q - 2^(bits - 1))
  bool fifth_bit;  // a 32-bit word follows
};

template <Fields fields>
void decode_q4_or_q5(const Byte* block, float* out) {
  const float d = half_at(block);
  const float m = fields.minimum ? half_at(block + 2) : 0.0F;
  block += fields.minimum ? 4 : 2;
  const std::uint32_t fifth = fields.fifth_bit ? word_at(block) : 0;
  block += fields.fifth_bit ? 4 : 0;
  for (int i = 0; i < 32; ++i) {
    const int nibble = i < 16 ? block[i] & 0x0f : block[i - 16] >> 4;
    const int q = nibble | static_cast<int>((fifth >> i & 1U) << 4U);
    if constexpr (fields.minimum) {
      out[i] = d * real(q) + m;
    } else {
      out[i] = d * real(q - (fields.fifth_bit ? 16 : 8));
    }
  }
}

// The K types have 256 numbers a block. Their two-bit fields are laid out in stripes: a byte holds the
// numbers that are 32 apart, lowest bits first, and 32 bytes make 128 consecutive numbers.
int two_bits(const Byte* bytes, int i) { return bytes[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3; }

// | 16 x (4-bit scale, 4-bit minimum) | 64 bytes of two-bit numbers | half d | half dmin |
void decode_q2_k(const Byte* block, float* out) {
  const Byte* numbers = block + 16;
  const float d = half_at(block + 80);
  const float dmin = half_at(block + 82);
  for (int i = 0; i < 256; ++i) {
    const Byte scale = block[i / 16];
    out[i] = d * real(scale & 0x0f) * real(two_bits(numbers, i)) - dmin * real(scale >> 4);
  }
}

// | 32 bytes: third bits, inverted | 64 bytes: two low bits | 16 six-bit scales in 12 bytes | half d |
void decode_q3_k(const Byte* block, float* out) {
  const Byte* numbers = block + 32;
  const Byte* packed = block + 96;
  const float d = half_at(block + 108);
  for (int i = 0; i < 256; ++i) {
    const int s = i / 16;
    const int low = packed[s % 8] >> (s / 8 * 4) & 0x0f;
    const int high = packed[8 + s % 4] >> (s / 4 * 2) & 3;
    const int scale = (low | high << 4) - 32;
    const int third = block[i % 32] >> (i / 32) & 1;
    out[i] = d * real(scale) * real(two_bits(numbers, i) - (third == 1 ? 0 : 4));
  }
}

struct ScaleAndMinimum {
  int scale;
  int minimum;
};

// Q4_K and Q5_K: eight six-bit scales and minima in 12 bytes. The first four of each lie in the low six bits
// of bytes 0-3 and 4-7; the last four have their low nibble in bytes 8-11 and their two top bits above the
// first four.
ScaleAndMinimum unpack(const Byte* packed, int s) {
  if (s < 4) return {packed[s] & 0x3f, packed[s + 4] & 0x3f};
  return {(packed[s + 4] & 0x0f) | (packed[s - 4] >> 6 << 4), (packed[s + 4] >> 4) | (packed[s] >> 6 << 4)};
}

// Four-bit numbers of the K types: 32 bytes make 64 numbers, low nibbles first.
int nibble_of_64(const Byte* bytes, int i) { return bytes[i / 64 * 32 + i % 32] >> (i % 64 / 32 * 4) & 0x0f; }

// | half d | half dmin | 12 bytes of scales | 128 bytes of nibbles |
void decode_q4_k(const Byte* block, float* out) {
  const float d = half_at(block);
  const float dmin = half_at(block + 2);
  for (int i = 0; i < 256; ++i) {
    const ScaleAndMinimum s = unpack(block + 4, i / 32);
    out[i] = d * real(s.scale) * real(nibble_of_64(block + 16, i)) - dmin * real(s.minimum);
  }
}

// | half d | half dmin | 12 bytes of scales | 32 bytes of fifth bits | 128 bytes of nibbles |
void decode_q5_k(const Byte* block, float* out) {
  const float d = half_at(block);
  const float dmin = half_at(block + 2);
  for (int i = 0; i < 256; ++i) {
    const ScaleAndMinimum s = unpack(block + 4, i / 32);
    const int fifth = block[16 + i % 32] >> (i / 32) & 1;
    out[i] = d * real(s.scale) * real(nibble_of_64(block + 48, i) | fifth << 4) - dmin * real(s.minimum);
  }
}

// | 128 bytes of low nibbles | 64 bytes: two top bits | 16 signed scales | half d |
// The nibbles are in stripes of 64 here: 64 bytes make 128 numbers, low nibbles first.
void decode_q6_k(const Byte* block, float* out) {
  const Byte* top = block + 128;
  const Byte* scales = block + 192;
  const float d = half_at(block + 208);
  for (int i = 0; i < 256; ++i) {
    const int low = block[i / 128 * 64 + i % 64] >> (i % 128 / 64 * 4) & 0x0f;
    const int q = (low | two_bits(top, i) << 4) - 32;
    out[i] = d * real(signed_byte(scales[i / 16])) * real(q);
  }
}

struct Decoder {
  TensorType type;
  BlockShape block;
  void (*decode)(const Byte* block, float* out);
};

constexpr std::array decoders = {
    Decoder{TensorType::f32, {1, 4}, decode_f32},
    Decoder{TensorType::f16, {1, 2}, decode_f16},
    Decoder{TensorType::bf16, {1, 2}, decode_bf16},
    Decoder{TensorType::q8_0, {32, 34}, decode_q8_0},
    Decoder{TensorType::q4_0, {32, 18}, decode_q4_or_q5<Fields{.minimum = false, .fifth_bit = false}>},
    Decoder{TensorType::q4_1, {32, 20}, decode_q4_or_q5<Fields{.minimum = true, .fifth_bit = false}>},
    Decoder{TensorType::q5_0, {32, 22}, decode_q4_or_q5<Fields{.minimum = false, .fifth_bit = true}>},
    Decoder{TensorType::q5_1, {32, 24}, decode_q4_or_q5<Fields{.minimum = true, .fifth_bit = true}>},
    Decoder{TensorType::q2_k, {256, 84}, decode_q2_k},
    Decoder{TensorType::q3_k, {256, 110}, decode_q3_k},
    Decoder{TensorType::q4_k, {256, 144}, decode_q4_k},
    Decoder{TensorType::q5_k, {256, 176}, decode_q5_k},
    Decoder{TensorType::q6_k, {256, 210}, decode_q6_k},
};

const Decoder* find_decoder(TensorType type) {
  const auto* found = std::ranges::find(decoders, type, &Decoder::type);
  return found == decoders.end() ? nullptr : found;
}

const Decoder& decoder_of(TensorType type) {
  const Decoder* decoder = find_decoder(type);
  if (decoder == nullptr) {
    throw Error(fmt::format("tensor type {} has no decoder; convert the model to Q8_0, Q4_K or F16",
                            type_name(type)));
  }
  return *decoder;
}

}  // namespace

bool is_supported(TensorType type) { return find_decoder(type) != nullptr; }

BlockShape block_shape(TensorType type) { return decoder_of(type).block; }

void dequantise(TensorType type, std::span<const std::byte> bytes, std::span<float> out) {
  const Decoder& decoder = decoder_of(type);
  const std::size_t blocks = out.size() / decoder.block.elements;
  if (out.size() % decoder.block.elements != 0 || bytes.size() != blocks * decoder.block.bytes) {
    throw Error(fmt::format("{} bytes of {} do not make {} numbers: {} bytes are {} of them", bytes.size(),
                            type_name(type), out.size(), decoder.block.bytes, decoder.block.elements));
  }
  const auto* in = reinterpret_cast<const Byte*>(bytes.data());
  for (std::size_t b = 0; b < blocks; ++b) {
    decoder.decode(in + b * decoder.block.bytes, out.data() + b * decoder.block.elements);
  }
}

}  // namespace engine
