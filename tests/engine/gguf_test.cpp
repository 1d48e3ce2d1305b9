// The GGUF reader: what a correct file gives, and that a broken or hostile one gives a clear error and
// nothing else.
#include "engine/gguf.hpp"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <random>

#include "engine/gguf_writer.hpp"
#include "engine/sha256.hpp"
#include "message_of.hpp"

namespace engine {
namespace {

using compresskv::test::message_of;
using compresskv::test::says;
using test::Bytes;
using test::GgufWriter;

GgufWriter small_file() {
  GgufWriter writer;
  writer.set("general.architecture", std::string{"llama"})
      .set("a.u8", std::uint8_t{200})
      .set("a.i8", std::int8_t{-7})
      .set("a.u16", std::uint16_t{60000})
      .set("a.i16", std::int16_t{-300})
      .set("a.u32", std::uint32_t{4000000000})
      .set("a.i32", std::int32_t{-5})
      .set("a.u64", std::uint64_t{1} << 40)
      .set("a.i64", std::int64_t{-1} << 40)
      .set("a.f32", 1.5F)
      .set("a.f64", 2.25)
      .set("a.yes", true)
      .set_array("list.text", std::vector<std::string>{"", "b", "three"})
      .set_array("list.i32", std::vector<std::int32_t>{1, -2, 3})
      .set_array("list.f32", std::vector<float>{0.5F, 1.0F})
      .set_array("list.bool", std::vector<bool>{true, false})
      .set_array("list.empty", std::vector<std::string>{});
  writer.tensor("first", {2, 3}, std::vector<float>{1, 2, 3, 4, 5, 6});
  writer.tensor("second", {32}, 8, std::vector<std::byte>(34));
  writer.tensor("third", {1}, std::vector<float>{7});
  return writer;
}

GgufFile parse(const GgufWriter& writer) { return GgufFile::from_bytes(writer.bytes(), "test.gguf"); }

TEST(Gguf, ReadsMetadataOfEveryType) {
  for (const std::uint32_t version : {2U, 3U}) {
    GgufWriter writer = small_file();
    writer.version = version;
    const GgufFile file = parse(writer);
    EXPECT_EQ(file.version(), version);
    EXPECT_EQ(file.get<std::string>("general.architecture"), "llama");
    EXPECT_EQ(file.get<int>("a.u8"), 200);
    EXPECT_EQ(file.get<int>("a.i8"), -7);
    EXPECT_EQ(file.get<int>("a.u16"), 60000);
    EXPECT_EQ(file.get<int>("a.i16"), -300);
    EXPECT_EQ(file.get<std::uint32_t>("a.u32"), 4000000000U);
    EXPECT_EQ(file.get<std::int64_t>("a.i32"), -5);
    EXPECT_EQ(file.get<std::uint64_t>("a.u64"), std::uint64_t{1} << 40);
    EXPECT_EQ(file.get<std::int64_t>("a.i64"), std::int64_t{-1} << 40);
    EXPECT_EQ(file.get<float>("a.f32"), 1.5F);
    EXPECT_EQ(file.get<double>("a.f64"), 2.25);
    EXPECT_TRUE(file.get<bool>("a.yes"));
    EXPECT_EQ(file.get<std::vector<std::string>>("list.text"), (std::vector<std::string>{"", "b", "three"}));
    EXPECT_EQ(file.get<std::vector<int>>("list.i32"), (std::vector<int>{1, -2, 3}));
    EXPECT_EQ(file.get<std::vector<float>>("list.f32"), (std::vector<float>{0.5F, 1.0F}));
    EXPECT_EQ(file.get<std::vector<bool>>("list.bool"), (std::vector<bool>{true, false}));
    EXPECT_TRUE(file.get<std::vector<std::string>>("list.empty").empty());
    EXPECT_FALSE(file.find<int>("a.none").has_value());
    EXPECT_EQ(file.metadata().size(), 17U);
  }
}

TEST(Gguf, RefusesValuesOfAnotherKindAndThoseThatDoNotFit) {
  const GgufFile file = parse(small_file());
  EXPECT_TRUE(says(message_of<Error>([&] { file.get<int>("a.u32"); }), {"a.u32", "4000000000"}));
  EXPECT_TRUE(says(message_of<Error>([&] { file.get<unsigned>("a.i8"); }), {"a.i8", "-7"}));
  EXPECT_TRUE(says(message_of<Error>([&] { file.get<int>("a.f32"); }), {"a.f32", "real number"}));
  EXPECT_TRUE(says(message_of<Error>([&] { file.get<bool>("a.u8"); }), {"a.u8", "unsigned integer"}));
  EXPECT_TRUE(says(message_of<Error>([&] { file.get<std::string>("list.text"); }), {"list.text", "array"}));
  EXPECT_TRUE(says(message_of<Error>([&] { file.get<std::vector<unsigned>>("list.i32"); }), {"list.i32"}));
  EXPECT_TRUE(says(message_of<Error>([&] { file.get<int>("a.none"); }), {"a.none", "missing"}));
}

TEST(Gguf, FindsTensorsAndTheirBytes) {
  const GgufFile file = parse(small_file());
  ASSERT_EQ(file.tensors().size(), 3U);
  const Tensor* first = file.find_tensor("first");
  ASSERT_NE(first, nullptr);
  EXPECT_EQ(first->shape, (std::vector<std::uint64_t>{2, 3}));
  EXPECT_EQ(first->elements, 6U);
  const std::vector<std::byte> data = file.read(*first);
  ASSERT_EQ(data.size(), 24U);
  float fourth = 0;
  std::memcpy(&fourth, data.data() + 12, sizeof fourth);
  EXPECT_EQ(fourth, 4.0F);
  EXPECT_EQ(file.read(*file.find_tensor("second")).size(), 34U);
  EXPECT_EQ(file.find_tensor("none"), nullptr);
}

TEST(Gguf, KeepsTensorsValidWhenMoved) {
  GgufFile file = parse(small_file());
  const std::vector<std::byte> before = file.read(*file.find_tensor("third"));
  const GgufFile moved = std::move(file);
  EXPECT_EQ(moved.read(*moved.find_tensor("third")), before);
}

TEST(Gguf, HonoursTheFilesAlignment) {
  GgufWriter writer;
  writer.alignment = 128;
  writer.set("general.alignment", std::uint32_t{128});
  writer.tensor("a", {1}, std::vector<float>{1});
  writer.tensor("b", {1}, std::vector<float>{2});
  const GgufFile file = parse(writer);
  EXPECT_EQ(file.find_tensor("b")->offset - file.find_tensor("a")->offset, 128U);
}

TEST(Gguf, ShowsValuesForPeople) {
  const GgufFile file = parse(small_file());
  EXPECT_EQ(value_text(*file.find_value("list.text"), 2), "[\"\", \"b\", ... 3 items]");
  EXPECT_EQ(value_text(*file.find_value("a.i8")), "-7");
  EXPECT_EQ(value_text(MetadataValue{std::string{"a\"\n\x01"}}), "\"a\\\"\\n\\x01\"");
}

struct Broken {
  std::string_view name;
  std::function<void(GgufWriter&)> change;
  std::vector<std::string_view> message;
};

Bytes raw(std::initializer_list<std::uint32_t> words, std::uint64_t tail) {
  Bytes bytes;
  for (const std::uint32_t word : words) bytes.put(word);
  return bytes.put(tail);
}

const Broken broken_files[] = {
    {"magic", [](GgufWriter& w) { w.magic = 0x46554748; }, {"does not begin with GGUF"}},
    {"version_1", [](GgufWriter& w) { w.version = 1; }, {"version 1", "2 and 3"}},
    {"version_4", [](GgufWriter& w) { w.version = 4; }, {"version 4"}},
    {"big_endian", [](GgufWriter& w) { w.version = 3U << 24U; }, {"big-endian"}},
    {"one_tensor_too_many", [](GgufWriter& w) { w.more_tensors = 1; }, {"tensor 4 of 4"}},
    {"huge_tensor_count",
     [](GgufWriter& w) { w.more_tensors = std::int64_t{1} << 60; },
     {"tensors take at least"}},
    {"huge_metadata_count",
     [](GgufWriter& w) { w.more_metadata = std::int64_t{1} << 60; },
     {"metadata entries take at least"}},
    {"metadata_count_wraps",
     [](GgufWriter& w) { w.more_metadata = -18; },
     {"metadata entries take at least"}},
    {"empty_key", [](GgufWriter& w) { w.set("", true); }, {"key is empty"}},
    {"key_twice", [](GgufWriter& w) { w.metadata.push_back(w.metadata[3]); }, {"a.u16", "twice"}},
    {"value_type", [](GgufWriter& w) { w.set_raw("a.u8", raw({13}, 0)); }, {"a.u8", "type 13"}},
    {"bool_of_2",
     [](GgufWriter& w) { w.set_raw("a.yes", Bytes{}.put(std::uint32_t{7}).put(std::uint8_t{2})); },
     {"a.yes", "0 or 1"}},
    {"string_too_long",
     [](GgufWriter& w) { w.set_raw("a.u8", raw({8}, 1U << 30U)); },
     {"a.u8", "1073741824 bytes"}},
    {"string_wraps",
     [](GgufWriter& w) { w.set_raw("a.u8", raw({8}, std::numeric_limits<std::uint64_t>::max())); },
     {"a.u8"}},
    {"array_of_arrays",
     [](GgufWriter& w) {
       w.set_raw("a.u8", raw({9, 9}, 1));
     },
     {"a.u8", "array of arrays"}},
    {"array_item_type",
     [](GgufWriter& w) {
       w.set_raw("a.u8", raw({9, 77}, 1));
     },
     {"a.u8", "type 77"}},
    {"array_beyond_file",
     [](GgufWriter& w) {
       w.set_raw("a.u8", raw({9, 10}, 1000000));
     },
     {"a.u8", "1000000 array items"}},
    {"array_huge",
     [](GgufWriter& w) {
       w.set_raw("a.u8", raw({9, 0}, std::uint64_t{1} << 61));
     },
     {"a.u8", "at most"}},
    {"alignment_0",
     [](GgufWriter& w) { w.set("general.alignment", std::uint32_t{0}); },
     {"general.alignment is 0"}},
    {"alignment_48",
     [](GgufWriter& w) { w.set("general.alignment", std::uint32_t{48}); },
     {"general.alignment is 48"}},
    {"alignment_text",
     [](GgufWriter& w) { w.set("general.alignment", std::string{"32"}); },
     {"general.alignment", "text"}},
    {"no_name", [](GgufWriter& w) { w.tensors[0].name = ""; }, {"name is empty"}},
    {"name_twice", [](GgufWriter& w) { w.tensors[2].name = "first"; }, {"\"first\"", "twice"}},
    {"no_dimensions", [](GgufWriter& w) { w.tensors[0].shape = {}; }, {"\"first\"", "0 dimensions"}},
    {"five_dimensions",
     [](GgufWriter& w) {
       w.tensors[0].shape = {1, 1, 1, 2, 3};
     },
     {"5 dimensions"}},
    {"zero_extent",
     [](GgufWriter& w) {
       w.tensors[0].shape = {2, 0};
     },
     {"\"first\"", "[2, 0]"}},
    {"product_overflows",
     [](GgufWriter& w) {
       w.tensors[0].shape = {1ULL << 32, 1ULL << 32};
     },
     {"\"first\"", "too large"}},
    {"product_to_zero",
     [](GgufWriter& w) {
       w.tensors[0].shape = {1ULL << 32, 1ULL << 31, 2};
     },
     {"too large"}},
    {"beyond_file",
     [](GgufWriter& w) {
       w.tensors[0].shape = {2, 300};
     },
     {"\"first\"", "goes beyond the file"}},
    {"unknown_type", [](GgufWriter& w) { w.tensors[0].type = 23; }, {"\"first\"", "IQ4_XS"}},
    {"no_such_type", [](GgufWriter& w) { w.tensors[0].type = 4000; }, {"\"first\"", "type 4000"}},
    {"part_of_block",
     [](GgufWriter& w) {
       w.tensors[1].shape = {16, 2};
     },
     {"\"second\"", "blocks of 32"}},
    {"odd_offset", [](GgufWriter& w) { w.tensors[1].offset += 4; }, {"\"second\"", "alignment 32"}},
    {"data_of_two_tensors",
     [](GgufWriter& w) { w.tensors[2].offset = w.tensors[1].offset; },
     {"begins at byte", "inside tensor", "\"second\"", "\"third\""}},
    {"data_partly_of_two_tensors",
     [](GgufWriter& w) {
       w.tensors[0].shape = {2, 5};  // 40 bytes, the next begins after 32
     },
     {"\"second\"", "inside tensor \"first\"", "40 bytes"}},
    {"far_offset",
     [](GgufWriter& w) { w.tensors[2].offset = ~std::uint64_t{31}; },
     {"\"third\"", "goes beyond the file"}},
};

class BrokenGguf : public testing::TestWithParam<Broken> {};

TEST_P(BrokenGguf, IsRefusedWithItsReason) {
  GgufWriter writer = small_file();
  ASSERT_NO_THROW(parse(writer));
  GetParam().change(writer);
  const std::string message = message_of<Error>([&] { parse(writer); });
  EXPECT_TRUE(says(message, {"test.gguf"}));
  for (const std::string_view part : GetParam().message) EXPECT_TRUE(says(message, {part}));
}

INSTANTIATE_TEST_SUITE_P(Fields, BrokenGguf, testing::ValuesIn(broken_files),
                         [](const auto& tested) { return std::string{tested.param.name}; });

TEST(Gguf, RefusesTruncationAtEveryByte) {
  const std::vector<std::byte> whole = small_file().bytes();
  ASSERT_NO_THROW(GgufFile::from_bytes(whole, "whole"));
  for (std::size_t size = 0; size < whole.size(); ++size) {
    EXPECT_THROW(GgufFile::from_bytes(std::span{whole}.first(size), "part"), Error)
        << size << " of " << whole.size();
  }
}

// Whatever the bytes, the reader either refuses them or gives tensors that lie within the file.
TEST(Gguf, SurvivesRandomChanges) {
  const std::vector<std::byte> whole = small_file().bytes();
  std::mt19937_64 random{20240607};
  int accepted = 0;
  for (int round = 0; round < 20000; ++round) {
    std::vector<std::byte> bytes = whole;
    for (auto changes = 1 + random() % 4; changes > 0; --changes) {
      const std::size_t at = random() % bytes.size();
      switch (random() % 4) {
        case 0:
          bytes[at] = static_cast<std::byte>(random());
          break;
        case 1:
          bytes[at] = std::byte{0xff};
          break;
        case 2:
          bytes[at] ^= static_cast<std::byte>(1U << random() % 8);
          break;
        default:
          bytes.erase(bytes.begin() + static_cast<std::ptrdiff_t>(at));
      }
    }
    try {
      const GgufFile file = GgufFile::from_bytes(bytes, "changed");
      ++accepted;
      std::size_t total = 0;
      for (const Tensor& tensor : file.tensors()) {
        for (const std::byte byte : file.read(tensor)) total += std::to_integer<std::size_t>(byte);
      }
      for (const MetadataEntry& entry : file.metadata()) total += value_text(entry.value).size();
      EXPECT_GT(total, 0U);
    } catch (const Error&) {
    }
  }
  // Most single changes hit names, values or data and are harmless: both outcomes must have been seen.
  EXPECT_GT(accepted, 1000);
  EXPECT_LT(accepted, 19000);
}

TEST(Gguf, OpensFilesAndNamesThoseItCannotOpen) {
  const std::filesystem::path folder = std::filesystem::temp_directory_path();
  const std::filesystem::path path =
      folder / ("compresskv_gguf_test_" + std::to_string(std::random_device{}()) + ".gguf");
  const std::vector<std::byte> bytes = small_file().bytes();
  std::ofstream{path, std::ios::binary}.write(reinterpret_cast<const char*>(bytes.data()),
                                              static_cast<std::streamsize>(bytes.size()));
  const GgufFile file = GgufFile::open(path);
  EXPECT_EQ(file.file_bytes(), bytes.size());
  EXPECT_EQ(file.get<std::string>("general.architecture"), "llama");

  std::ofstream{path, std::ios::binary | std::ios::trunc};
  EXPECT_TRUE(says(message_of<Error>([&] { GgufFile::open(path); }), {path.string(), "empty"}));
  std::filesystem::remove(path);
  EXPECT_TRUE(says(message_of<Error>([&] { GgufFile::open(path); }), {path.string(), "cannot open"}));
  EXPECT_TRUE(
      says(message_of<Error>([&] { GgufFile::open(folder); }), {folder.string(), "not a regular file"}));
}

class GgufFiles : public testing::Test {
 protected:
  ~GgufFiles() override { std::filesystem::remove(path); }

  void write(std::span<const std::byte> bytes) const {
    std::ofstream{path, std::ios::binary}.write(reinterpret_cast<const char*>(bytes.data()),
                                                static_cast<std::streamsize>(bytes.size()));
  }

  std::filesystem::path path = std::filesystem::temp_directory_path() /
                               ("compresskv_gguf_test_" + std::to_string(std::random_device{}()) + ".gguf");
};

// A mapped file would end the process with SIGBUS here.
TEST_F(GgufFiles, AFileThatIsCutWhileItIsOpenIsAnError) {
  const std::vector<std::byte> bytes = small_file().bytes();
  write(bytes);
  const GgufFile file = GgufFile::open(path);
  const Tensor& third = *file.find_tensor("third");
  EXPECT_EQ(file.read(third).size(), 4U);
  std::filesystem::resize_file(path, third.offset + 1);
  EXPECT_TRUE(says(message_of<Error>([&] { file.read(third); }),
                   {path.string(), "ends at byte " + std::to_string(third.offset + 1) + " now",
                    std::to_string(bytes.size())}));
}

TEST_F(GgufFiles, PipesAndDevicesAreRefusedAtOnce) {
  ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
  for (const std::filesystem::path& wrong : {path, std::filesystem::path{"/dev/zero"}}) {
    EXPECT_TRUE(
        says(message_of<Error>([&] { GgufFile::open(wrong); }), {wrong.string(), "not a regular file"}));
  }
}

// By its size such a file could hold what it claims; on the disk it is a few bytes.
TEST_F(GgufFiles, AFileFullOfHolesAllocatesNothingLarge) {
  const auto message = [&](const GgufWriter& writer) {
    write(writer.bytes());
    std::filesystem::resize_file(path, std::uintmax_t{1} << 42);
    return message_of<Error>([&] { GgufFile::open(path); });
  };
  GgufWriter text = small_file();
  text.set_raw("a.u8", raw({8}, std::uint64_t{1} << 40));
  EXPECT_TRUE(says(message(text), {"a.u8", "1099511627776 bytes", "at most 67108864"}));
  GgufWriter tensors = small_file();
  tensors.more_tensors = std::int64_t{1} << 33;
  EXPECT_TRUE(says(message(tensors), {"8589934595 tensors", "at most 1048576"}));
  GgufWriter entries = small_file();
  entries.more_metadata = std::int64_t{1} << 33;
  EXPECT_TRUE(says(message(entries), {"8589934609 metadata entries", "at most 1048576"}));
}

TEST(Sha256, GivesTheStandardsExamples) {
  const std::filesystem::path path = std::filesystem::temp_directory_path() /
                                     ("compresskv_sha_test_" + std::to_string(std::random_device{}()));
  const auto digest_of = [&](std::string_view text) {
    std::ofstream{path, std::ios::binary | std::ios::trunc} << text;
    return sha256_of_file(path);
  };
  EXPECT_EQ(digest_of(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(digest_of("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(digest_of(std::string(1000000, 'a')),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  // Longer than one piece of the reader.
  EXPECT_EQ(digest_of(std::string((1U << 20) + 1, 'a')).size(), 64U);
  std::filesystem::remove(path);
  EXPECT_TRUE(says(message_of<Error>([&] { sha256_of_file(path); }), {path.string()}));
}

}  // namespace
}  // namespace engine
