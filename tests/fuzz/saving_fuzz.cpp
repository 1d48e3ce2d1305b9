// Any bytes as a saved sequence: refused with an Error of one short line and nothing changed, or loaded, and
// then whatever is asked of it is answered or refused.
//
// The first byte says which plan loads it, and whether the rest is a whole stream, or contents that are given
// their head and a right checksum: else no input would come far.
#include <compresskv/compresskv.hpp>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

namespace {

using namespace compresskv;

constexpr MadeWith made{.method = "m", .calibration = "c"};
constexpr std::size_t allocated = 256;

void check(bool holds) {
  if (!holds) std::abort();
}

std::string sealed(std::string_view body) {
  sequence::SavedWriter writer;
  writer.number(sequence::saved_version, 4);
  writer.number(body.size());
  std::string bytes(sequence::saved_magic);
  bytes.append(writer.bytes()).append(body);
  sequence::Checksum sum;
  sum.add(bytes);
  sequence::SavedWriter tail;
  tail.number(sum.value());
  return bytes.append(tail.bytes());
}

template <class C>
std::string saved(const C& compressor) {
  std::ostringstream out;
  compressor.save(out, made);
  return out.str();
}

/// What an engine may ask next; errors are answers.
template <class C>
void ask(C compressor, const ModelShape& shape) {
  std::vector<float> rows(shape.kv_heads * allocated * shape.head_dim, 1.0F);
  for (std::size_t layer = 0; layer < shape.layers; ++layer) {
    const Retained& kept = compressor.retained(layer);
    for (std::size_t head = 0; head < shape.kv_heads; ++head) {
      std::size_t row = 0;
      for (const std::uint32_t position : kept.positions(head)) {
        check(position < kept.next_position() && kept.row(position, head) == row);
        check(kept.position(row, head) == position && kept.rows_before(position, head) == row);
        ++row;
      }
      check(row == kept.rows(head));
    }
  }
  const auto attempt = [&](auto&& call) {
    try {
      call();
    } catch (const Error& error) {
      const std::string_view message = error.what();
      check(message.size() < 2000 && message.find('\n') == std::string_view::npos);
    }
  };
  const auto turn = [&] {
    for (std::size_t layer = 0; layer < shape.layers; ++layer) {
      attempt([&] {
        const Retained& kept = compressor.retained(layer);
        std::vector<std::size_t> in_use(shape.kv_heads);
        for (std::size_t head = 0; head < shape.kv_heads; ++head) {
          in_use[head] = kept.rows(head) + 2;
          if (in_use[head] > allocated) return;
        }
        const KvShape now{.kv_heads = shape.kv_heads,
                          .head_dim = shape.head_dim,
                          .allocated_rows = allocated,
                          .head_rows = in_use};
        compressor.compress(layer, StridedKv{rows.data(), rows.data(), now, layout::head_token_dim});
      });
    }
  };
  turn();
  attempt([&] {
    const std::size_t tokens = compressor.retained(0).next_position() + 2;
    if (tokens <= 1U << 16U) compressor.begin_turn(tokens);
  });
  turn();
  attempt([&] { compressor.truncate(compressor.retained(0).next_position() / 2); });
  attempt([&] { static_cast<void>(compressor.held(100).rows(0, 0)); });
  check(!saved(compressor).empty());
}

template <class P>
void load(const P& plan, const std::string& bytes) {
  Compressor compressor{plan};
  compressor.begin(20);
  const std::string before = saved(compressor);
  std::istringstream in(bytes);
  try {
    compressor.load(in, made);
  } catch (const Error& error) {
    const std::string_view message = error.what();
    check(message.size() < 2000);
    for (const char c : message) check(c >= ' ' && c <= '~');
    check(saved(compressor) == before);
    return;
  }
  const std::string again = saved(compressor);
  check(std::string_view(bytes).starts_with(again));
  ask(compressor, plan.shape());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const std::string_view rest(reinterpret_cast<const char*>(data) + 1, size - 1);
  const std::string bytes = (data[0] & 1U) == 0 ? std::string(rest) : sealed(rest);
  const ModelShape one{.layers = 1, .query_heads = 1, .kv_heads = 1, .head_dim = 1};
  const ModelShape two{.layers = 2, .query_heads = 2, .kv_heads = 2, .head_dim = 1};
  const budget::Uniform rows{Budget::tokens_per_layer(9)};
  switch (data[0] >> 1U & 3U) {
    case 0:
      load(Plan{one, score::StreamingLlm{{.window = 8}}, select::SharedTopK{}, rows}, bytes);
      break;
    case 1:
      load(Plan{two, score::StreamingLlm{{.window = 8}}, select::SharedTopK{}, rows}, bytes);
      break;
    default:
      load(Plan{two, score::Random{{.window = 8}}, select::GroupedTopK{}, rows}, bytes);
  }
  return 0;
}
