// Rules that a system message gives, and whether an answer follows them.
#pragma once

#include <string>
#include <string_view>

namespace ckv {

/// What an answer must be like. Its letters are looked at; no model judges.
struct Rule {
  std::string kind = {};   ///< its name, for records; empty: there is no rule
  std::string says = {};   ///< what the answer holds letter by letter, capitals too
  std::string never = {};  ///< what it does not hold, however it is capitalised; empty: anything goes
};

/// Whether a complete answer follows the rule. Every answer follows none.
bool obeys(const Rule& rule, std::string_view answer);

/// Whether an answer that may go on has broken the rule for good.
bool has_broken(const Rule& rule, std::string_view answer);

}  // namespace ckv
