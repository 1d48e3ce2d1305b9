#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "compresskv/core/budget.hpp"
#include "compresskv/core/error.hpp"
#include "compresskv/core/made_with.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/sequence/saved_bytes.hpp"

namespace compresskv::sequence {

/// What a compressed sequence is one of: the cache of another model, method, budget or calibration is no
/// less a cache, and would be taken without a word. Saved in front of the sequence, and compared before
/// anything of it is looked at.
class Fingerprint {
 public:
  Fingerprint(const ModelShape& shape, std::size_t window, const Budget& budget, const MadeWith& made)
      : shape_(shape), window_(window), budget_(budget.text()), made_(made) {
    detail::require(!made.method.empty(),
                    "MadeWith::method is empty: give a text that tells this method and its settings from "
                    "others");
  }

  void save(SavedWriter& out) const {
    for (const Number& number : numbers()) {
      out.number(number.value);
    }
    out.text(made_.method);
    out.text(budget_);
    out.text(made_.calibration);
  }

  /// Throws ArgumentError that says what differs.
  void check(SavedReader& in) const {
    for (const Number& own : numbers()) {
      const std::uint64_t saved = in.number("model");
      detail::require(saved == own.value, "saved sequence: ", own.what, " is ", saved, ", this plan's is ",
                      own.value, ": load it with what it was saved with, or compress the context again");
    }
    check_text("method", in.text("method"), made_.method);
    check_text("budget", in.text("budget"), budget_);
    check_text("calibration", in.text("calibration"), made_.calibration);
  }

 private:
  struct Number {
    const char* what;
    std::uint64_t value;
  };

  std::array<Number, 6> numbers() const {
    return {{{"ModelShape::layers", shape_.layers},
             {"ModelShape::query_heads", shape_.query_heads},
             {"ModelShape::kv_heads", shape_.kv_heads},
             {"ModelShape::head_dim", shape_.head_dim},
             {"ModelShape::kv_row_bytes", shape_.kv_row_bytes},
             {"window", window_}}};
  }

  static void check_text(const char* what, std::string_view saved, std::string_view own) {
    detail::require(saved == own, "saved sequence: ", what, " is ", shown(saved), ", this plan's is ",
                    shown(own), ": load it with what it was saved with, or compress the context again");
  }

  /// What a message shows of a text that may be anything.
  static std::string shown(std::string_view text) {
    constexpr std::size_t most = 200;
    std::string out = "'";
    for (const char character : text.substr(0, most)) {
      out += character >= ' ' && character <= '~' ? character : '?';
    }
    out += text.size() > most ? "...'" : "'";
    return out;
  }

  ModelShape shape_;
  std::uint64_t window_;
  std::string budget_;
  MadeWith made_;
};

}  // namespace compresskv::sequence
