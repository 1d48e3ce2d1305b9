// The decoders against recorded blocks and what the Python package `gguf` makes of them
// (tools/check_dequantise.py).
#include "engine/dequantise.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

namespace engine {
namespace {

constexpr TensorType all_types[] = {TensorType::f32,  TensorType::f16,  TensorType::bf16, TensorType::q8_0,
                                    TensorType::q4_0, TensorType::q4_1, TensorType::q5_0, TensorType::q5_1,
                                    TensorType::q2_k, TensorType::q3_k, TensorType::q4_k, TensorType::q5_k,
                                    TensorType::q6_k};

std::vector<std::byte> from_hex(const std::string& text) {
  std::vector<std::byte> bytes;
  for (std::size_t i = 0; i < text.size(); i += 2) {
    bytes.push_back(static_cast<std::byte>(std::stoi(text.substr(i, 2), nullptr, 16)));
  }
  return bytes;
}

TEST(Dequantise, GivesTheBitsOfTheReferenceForEveryType) {
  std::ifstream file{COMPRESSKV_TEST_DATA_DIR "/dequantise.json"};
  ASSERT_TRUE(file) << "the recorded blocks are missing";
  const nlohmann::json recorded = nlohmann::json::parse(file);
  std::set<TensorType> seen;
  for (const auto& entry : recorded.at("types")) {
    const auto type = static_cast<TensorType>(entry.at("code").get<std::uint32_t>());
    SCOPED_TRACE(type_name(type));
    EXPECT_EQ(type_name(type), entry.at("type").get<std::string>());
    const std::vector<std::byte> bytes = from_hex(entry.at("bytes"));
    const std::vector<std::byte> expected = from_hex(entry.at("floats"));
    std::vector<float> floats(expected.size() / sizeof(float));
    ASSERT_FALSE(floats.empty());
    dequantise(type, bytes, floats);
    for (std::size_t i = 0; i < floats.size(); ++i) {
      std::uint32_t bits = 0;
      std::memcpy(&bits, expected.data() + i * sizeof bits, sizeof bits);
      ASSERT_EQ(std::bit_cast<std::uint32_t>(floats[i]), bits)
          << "number " << i << ": " << floats[i] << " instead of " << std::bit_cast<float>(bits);
    }
    seen.insert(type);
  }
  for (const TensorType type : all_types)
    EXPECT_TRUE(seen.contains(type)) << type_name(type) << " is not recorded";
}

TEST(Dequantise, RefusesTypesWithoutDecoderByName) {
  std::vector<float> out(32);
  const std::vector<std::byte> bytes(64);
  for (const auto& [code, name] :
       {std::pair{9U, "Q8_1"}, {16U, "IQ2_XXS"}, {23U, "IQ4_XS"}, {28U, "F64"}, {99U, "type 99"}}) {
    const auto type = static_cast<TensorType>(code);
    EXPECT_FALSE(is_supported(type)) << name;
    try {
      dequantise(type, bytes, out);
      ADD_FAILURE() << name << " was decoded";
    } catch (const Error& error) {
      EXPECT_NE(std::string{error.what()}.find(name), std::string::npos) << error.what();
    }
  }
}

TEST(Dequantise, RefusesSizesThatDoNotAgree) {
  for (const TensorType type : all_types) {
    SCOPED_TRACE(type_name(type));
    const BlockShape block = block_shape(type);
    const std::vector<std::byte> bytes(2 * block.bytes);
    std::vector<float> out(2 * block.elements);
    EXPECT_NO_THROW(dequantise(type, bytes, out));
    EXPECT_THROW(dequantise(type, std::span{bytes}.first(bytes.size() - 1), out), Error);
    EXPECT_THROW(dequantise(type, std::span{bytes}.first(block.bytes), out), Error);
    if (block.elements > 1) {
      EXPECT_THROW(dequantise(type, bytes, std::span{out}.first(out.size() - 1)), Error);
    }
  }
}

}  // namespace
}  // namespace engine
