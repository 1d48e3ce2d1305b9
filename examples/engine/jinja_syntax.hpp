// A Jinja template as a tree.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace engine::jinja {

/// Throws Error about a line of the template.
[[noreturn]] void fail(std::size_t line, const std::string& problem);
/// The same about something that Jinja has and we have not.
[[noreturn]] void not_here(std::size_t line, const std::string& what);

inline constexpr std::size_t most_height = 200;  // of an expression, and of lists inside lists

struct Expression;
using ExpressionPtr = std::unique_ptr<Expression>;

struct Argument {
  std::string name;  // empty: by place
  ExpressionPtr value;
};

enum class Form {
  text,         // name
  number,       // name
  constant,     // name: true, false, none
  name,         // name
  list,         // parts
  tuple,        // parts
  mapping,      // parts: key, value, key, value ...
  chain,        // parts with ops between them, all of one rank, from the left
  all_of,       // parts: and
  any_of,       // parts: or
  negation,     // parts[0]: not
  minus,        // parts[0]
  plus,         // parts[0]
  comparison,   // parts with ops between them
  conditional,  // parts: condition, then, else or nothing
  attribute,    // parts[0].name
  item,         // parts[0][parts[1]]
  slice,        // parts[0][parts[1]:parts[2]:parts[3]], nothing where left out
  call,         // parts[0](arguments)
  filter,       // parts[0] | name(arguments)
  test          // parts[0] is name(arguments)
};

struct Expression {
  Form form = Form::constant;
  std::size_t line = 1;
  std::string name{};
  std::vector<ExpressionPtr> parts{};
  std::vector<std::string> ops{};
  std::vector<Argument> arguments{};
  std::size_t height = 1;  // of the tree: what evaluating and destroying it take of the stack
};

struct Statement;
using Block = std::vector<Statement>;

struct Parameter {
  std::string name;
  ExpressionPtr otherwise;  // or nothing
};

enum class Does { data, print, choose, loop, assign, capture, define, leave, go_on };

struct Statement {
  Does does = Does::data;
  std::size_t line = 1;
  std::string text{};                        // data; name of a macro
  std::vector<std::string> names{};          // what a loop or an assignment sets; of a namespace: two names
  bool to_namespace = false;                 // assign
  std::vector<ExpressionPtr> expressions{};  // print, assign: one; choose: conditions; loop: what, filter
  std::vector<Block> blocks{};               // choose: one a condition, and else; loop: body, else
  std::vector<Parameter> parameters{};       // define
};

/// Throws Error for what is no template, or is not understood. Takes time in proportion to the template.
Block parse(std::string_view source);

}  // namespace engine::jinja
