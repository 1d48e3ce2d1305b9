#include "rule.hpp"

#include "needle.hpp"

namespace ckv {

bool obeys(const Rule& rule, std::string_view answer) {
  return answer.find(rule.says) != std::string_view::npos && !has_broken(rule, answer);
}

bool has_broken(const Rule& rule, std::string_view answer) {
  return !rule.never.empty() && holds(answer, rule.never);
}

}  // namespace ckv
