#include "jinja.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <map>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "error.hpp"
#include "jinja_syntax.hpp"
#include "jinja_text.hpp"

namespace engine {
namespace jinja {
namespace {

constexpr std::size_t most_calls = 500;         // of evaluations inside each other
constexpr std::size_t most_steps = 2'000'000;   // evaluations
constexpr std::size_t most_bytes = 1ULL << 28;  // copied, besides 100 times the messages
constexpr std::int64_t most_range = 100'000;    // Jinja's own bound

// ---- values
// ----------------------------------------------------------------------------------------------------

struct Value;
using Values = std::vector<Value>;

struct Undefined {
  std::string name;  // for messages
};
struct None {};
struct List {
  std::shared_ptr<const Values> items;
  bool is_tuple = false;
  std::size_t height = 1;
};
struct Mapping {
  std::shared_ptr<const std::vector<std::pair<Value, Value>>> entries;
  std::size_t height = 1;
};
// What Jinja makes on the way and gives out once: map, select, reverse.
struct Stream {
  std::shared_ptr<std::optional<Values>> items;  // nothing: used up
};
struct Namespace {
  std::shared_ptr<std::map<std::string, Value>> names;
};
struct Loop {
  std::shared_ptr<const Values> items;
  std::size_t index = 0;
};
struct Scope;
struct Macro {
  const Statement* definition = nullptr;
  std::weak_ptr<Scope> around;  // which holds the macro
};
// A function of the language's own, or a method of a value.
struct Function {
  std::string name;
  std::shared_ptr<const Value> of;  // nothing for a function
};

struct Value {
  using Text = std::shared_ptr<const PromptText>;
  std::variant<Undefined, None, bool, std::int64_t, Text, List, Mapping, Stream, Namespace, Loop, Macro,
               Function>
      held;
};

struct Scope {
  std::map<std::string, Value, std::less<>> names;
  std::shared_ptr<Scope> around;
};

template <class T>
bool holds(const Value& value) {
  return std::holds_alternative<T>(value.held);
}

const PromptText* text_of(const Value& value) {
  const auto* text = std::get_if<Value::Text>(&value.held);
  return text == nullptr ? nullptr : text->get();
}

// Whole numbers, and true and false, which Python counts among them.
std::optional<std::int64_t> number_of(const Value& value) {
  if (const auto* number = std::get_if<std::int64_t>(&value.held)) return *number;
  if (const auto* truth = std::get_if<bool>(&value.held)) return *truth ? 1 : 0;
  return std::nullopt;
}

std::string_view kind_of(const Value& value) {
  constexpr auto names = std::to_array<std::string_view>({"an undefined value", "none", "a bool", "a number",
                                                          "a text", "a list", "a mapping", "a stream",
                                                          "a namespace", "a loop", "a macro", "a function"});
  return names[value.held.index()];
}

bool is_true(const Value& value) {
  if (holds<Undefined>(value) || holds<None>(value)) return false;
  if (const auto number = number_of(value)) return *number != 0;
  if (const PromptText* text = text_of(value)) return !text->empty();
  if (const auto* list = std::get_if<List>(&value.held)) return !list->items->empty();
  if (const auto* mapping = std::get_if<Mapping>(&value.held)) return !mapping->entries->empty();
  return true;
}

struct Arguments {
  Values by_place;
  std::vector<std::pair<std::string, Value>> by_name;
};

enum class Flow { on, leave, go_on };

class Interpreter {
 public:
  explicit Interpreter(std::size_t message_bytes) : bytes_left_{most_bytes + 100 * message_bytes} {}

  Value text(std::string_view text, bool is_outside = false) {
    return text_value(PromptText(text, is_outside));
  }

  void set(Scope& scope, const std::string& name, Value value) {
    scope.names.insert_or_assign(name, std::move(value));
  }

  Flow run(const Block& block, const std::shared_ptr<Scope>& scope, PromptText& out) {
    for (const Statement& statement : block) {
      const Flow flow = run(statement, scope, out);
      if (flow != Flow::on) return flow;
    }
    return Flow::on;
  }

  Value list(Values items, bool is_tuple = false) {
    charge(items.size() * 8);
    std::size_t height = 1;
    for (const Value& item : items) height = std::max(height, height_over(item));
    return {List{
        .items = std::make_shared<const Values>(std::move(items)), .is_tuple = is_tuple, .height = height}};
  }
  static Value mapping(std::vector<std::pair<Value, Value>> entries) {
    std::size_t height = 1;
    for (const auto& [key, value] : entries) height = std::max(height, height_over(value));
    return {
        Mapping{.entries = std::make_shared<const std::vector<std::pair<Value, Value>>>(std::move(entries)),
                .height = height}};
  }

 private:
  struct Deeper {
    Interpreter& interpreter;
    Deeper(Interpreter& i, std::size_t line) : interpreter{i} {
      if (++interpreter.calls_ > most_calls)
        fail(line, "it goes too deep; macros may call themselves without end");
      if (++interpreter.steps_ > most_steps) {
        fail(line, "it takes more than " + std::to_string(most_steps) + " steps");
      }
    }
    Deeper(const Deeper&) = delete;
    Deeper& operator=(const Deeper&) = delete;
    ~Deeper() { --interpreter.calls_; }
  };

  // The height of a list that holds `item`. What could hold the list in turn must not go in: it would never
  // be freed.
  static std::size_t height_over(const Value& item) {
    std::size_t height = 1;
    if (const auto* list = std::get_if<List>(&item.held)) height = list->height + 1;
    if (const auto* mapping = std::get_if<Mapping>(&item.held)) height = mapping->height + 1;
    const bool is_plain = item.held.index() <= Value{Mapping{}}.held.index();
    if (!is_plain || height > most_height) {
      throw Error("the model's chat template puts " + std::string(kind_of(item)) +
                  " into a list; that is not supported here, lay the prompt out by hand as raw text");
    }
    return height;
  }

  void charge(std::size_t bytes) {
    if (bytes > bytes_left_) throw Error("the model's chat template makes too much text; ask with raw text");
    bytes_left_ -= bytes;
  }

  Value text_value(PromptText made) {
    charge(made.size());
    return {Value::Text{std::make_shared<const PromptText>(std::move(made))}};
  }
  Value part_of(const PromptText& text, std::size_t at, std::size_t count) {
    charge(count);
    return {Value::Text{std::make_shared<const PromptText>(text.substr(at, count))}};
  }
  static Value undefined(std::string name) { return {Undefined{std::move(name)}}; }
  static Value number(std::int64_t value) { return {value}; }
  static Value number(std::size_t value) { return {static_cast<std::int64_t>(value)}; }
  static Value stream(Values items) {
    return {Stream{std::make_shared<std::optional<Values>>(std::move(items))}};
  }

  // ---- statements

  Flow run(const Statement& statement, const std::shared_ptr<Scope>& scope, PromptText& out) {
    const Deeper deeper{*this, statement.line};
    switch (statement.does) {
      case Does::data:
        charge(statement.text.size());
        out.append(PromptText(statement.text, false));
        return Flow::on;
      case Does::print: {
        const Value value = evaluate(*statement.expressions[0], scope);
        const Value printed = printable(value, statement.line);
        charge(text_of(printed)->size());
        out.append(*text_of(printed));
        return Flow::on;
      }
      case Does::choose:
        for (std::size_t branch = 0; branch < statement.expressions.size(); ++branch) {
          if (is_true(evaluate(*statement.expressions[branch], scope))) {
            return run(statement.blocks[branch], scope, out);
          }
        }
        if (statement.blocks.size() == statement.expressions.size()) return Flow::on;
        return run(statement.blocks.back(), scope, out);
      case Does::loop:
        return run_loop(statement, scope, out);
      case Does::assign:
        assign(statement, scope, evaluate(*statement.expressions[0], scope));
        return Flow::on;
      case Does::capture: {
        PromptText captured;
        const auto inside = std::make_shared<Scope>(Scope{.names = {}, .around = scope});
        const Flow flow = run(statement.blocks[0], inside, captured);
        if (flow != Flow::on) not_here(statement.line, "leaving a set block");
        assign(statement, scope, text_value(std::move(captured)));
        return Flow::on;
      }
      case Does::define:
        set(*scope, statement.text, {Macro{.definition = &statement, .around = scope}});
        return Flow::on;
      case Does::leave:
        return Flow::leave;
      case Does::go_on:
        return Flow::go_on;
    }
    return Flow::on;
  }

  void assign(const Statement& statement, const std::shared_ptr<Scope>& scope, Value value) {
    if (!statement.to_namespace) {
      set(*scope, statement.names[0], std::move(value));
      return;
    }
    const Value target = look_up(statement.names[0], scope, statement.line);
    const auto* space = std::get_if<Namespace>(&target.held);
    if (space == nullptr) {
      fail(statement.line, "'" + statement.names[0] + "' is " + std::string(kind_of(target)) +
                               "; only of a namespace can names be set");
    }
    if (holds<Namespace>(value) || holds<Stream>(value))
      not_here(statement.line, "a namespace inside a namespace");
    space->names->insert_or_assign(statement.names[1], std::move(value));
  }

  void set_targets(const Statement& statement, Scope& scope, const Value& item) {
    if (statement.names.size() == 1) {
      set(scope, statement.names[0], item);
      return;
    }
    const Values parts = items_of(item, statement.line);
    if (parts.size() != statement.names.size()) {
      fail(statement.line,
           std::to_string(statement.names.size()) + " names for " + std::to_string(parts.size()) + " values");
    }
    for (std::size_t i = 0; i < parts.size(); ++i) set(scope, statement.names[i], parts[i]);
  }

  Flow run_loop(const Statement& statement, const std::shared_ptr<Scope>& scope, PromptText& out) {
    Values items = items_of(evaluate(*statement.expressions[0], scope), statement.line);
    if (statement.expressions.size() == 2) {
      Values chosen;
      for (Value& item : items) {
        const auto inside = std::make_shared<Scope>(Scope{.names = {}, .around = scope});
        set_targets(statement, *inside, item);
        if (is_true(evaluate(*statement.expressions[1], inside))) chosen.push_back(std::move(item));
      }
      items = std::move(chosen);
    }
    const auto shared = std::make_shared<const Values>(std::move(items));
    for (std::size_t index = 0; index < shared->size(); ++index) {
      const auto inside = std::make_shared<Scope>(Scope{.names = {}, .around = scope});
      set(*inside, "loop", {Loop{.items = shared, .index = index}});
      set_targets(statement, *inside, (*shared)[index]);
      if (run(statement.blocks[0], inside, out) == Flow::leave) break;
    }
    if (!shared->empty() || statement.blocks.size() == 1) return Flow::on;
    return run(statement.blocks[1], std::make_shared<Scope>(Scope{.names = {}, .around = scope}), out);
  }

  // ---- expressions

  Value look_up(const std::string& name, const std::shared_ptr<Scope>& scope, std::size_t line) const {
    for (const Scope* at = scope.get(); at != nullptr; at = at->around.get()) {
      const auto found = at->names.find(name);
      if (found != at->names.end()) return found->second;
    }
    for (const std::string_view known : {"raise_exception", "range", "namespace", "dict"}) {
      if (name == known) return {Function{.name = name, .of = nullptr}};
    }
    for (const std::string_view missing :
         {"lipsum", "cycler", "joiner", "caller", "varargs", "kwargs", "self"}) {
      if (name == missing) not_here(line, "'" + name + "'");
    }
    return undefined(name);
  }

  Value evaluate(const Expression& e, const std::shared_ptr<Scope>& scope) {
    const Deeper deeper{*this, e.line};
    switch (e.form) {
      case Form::text:
        return text(e.name);
      case Form::number:
        return number(std::int64_t{std::stoll(e.name)});
      case Form::constant:
        return e.name == "none" ? Value{None{}} : Value{e.name == "true"};
      case Form::name:
        return look_up(e.name, scope, e.line);
      case Form::list:
      case Form::tuple:
        return list(evaluate_all(e, scope), e.form == Form::tuple);
      case Form::mapping:
        return make_mapping(e, scope);
      case Form::chain:
        return evaluate_chain(e, scope);
      case Form::all_of:
      case Form::any_of:
        return evaluate_joined(e, scope);
      case Form::negation:
        return {!is_true(evaluate(*e.parts[0], scope))};
      case Form::minus:
      case Form::plus:
        return evaluate_sign(e, scope);
      case Form::comparison:
        return evaluate_comparison(e, scope);
      case Form::conditional:
        if (is_true(evaluate(*e.parts[0], scope))) return evaluate(*e.parts[1], scope);
        return e.parts.size() == 3 ? evaluate(*e.parts[2], scope) : undefined("the value without else");
      case Form::attribute:
        return attribute_of(evaluate(*e.parts[0], scope), e.name, e.line);
      case Form::item:
        return evaluate_item(e, scope);
      case Form::slice:
        return evaluate_slice(e, scope);
      case Form::call:
        return evaluate_call(e, scope);
      case Form::filter:
        return evaluate_filter(e, scope);
      case Form::test:
        return evaluate_test(e, scope);
    }
    return {None{}};
  }

  Values evaluate_all(const Expression& e, const std::shared_ptr<Scope>& scope) {
    Values out;
    for (const ExpressionPtr& part : e.parts) out.push_back(evaluate(*part, scope));
    return out;
  }

  Arguments evaluate_arguments(const Expression& e, const std::shared_ptr<Scope>& scope) {
    Arguments out;
    for (const Argument& argument : e.arguments) {
      Value value = evaluate(*argument.value, scope);
      if (argument.name.empty()) {
        out.by_place.push_back(std::move(value));
      } else {
        out.by_name.emplace_back(argument.name, std::move(value));
      }
    }
    return out;
  }

  Value make_mapping(const Expression& e, const std::shared_ptr<Scope>& scope) {
    std::vector<std::pair<Value, Value>> entries;
    for (std::size_t at = 0; at < e.parts.size(); at += 2) {
      Value key = evaluate(*e.parts[at], scope);
      if (text_of(key) == nullptr) not_here(e.line, "a mapping whose keys are no texts");
      Value value = evaluate(*e.parts[at + 1], scope);
      const auto known = std::find_if(entries.begin(), entries.end(), [&](const auto& entry) {
        return text_of(entry.first)->text() == text_of(key)->text();
      });
      step(e.line, entries.size());
      if (known != entries.end()) {
        known->second = std::move(value);
      } else {
        entries.emplace_back(std::move(key), std::move(value));
      }
    }
    return mapping(std::move(entries));
  }

  void step(std::size_t line, std::size_t count) {
    steps_ += count;
    if (steps_ > most_steps) fail(line, "it takes more than " + std::to_string(most_steps) + " steps");
  }

  // Texts are joined in one go: what is added last may be a long message.
  Value evaluate_chain(const Expression& e, const std::shared_ptr<Scope>& scope) {
    Value left = evaluate(*e.parts[0], scope);
    for (std::size_t at = 0; at < e.ops.size(); ++at) {
      const std::string& op = e.ops[at];
      const Value right = evaluate(*e.parts[at + 1], scope);
      left = op == "~" ? joined(printable(left, e.line), printable(right, e.line))
                       : combined(op, left, right, e.line);
    }
    return left;
  }

  Value joined(const Value& left, const Value& right) {
    charge(text_of(left)->size() + text_of(right)->size());
    PromptText out = *text_of(left);
    out.append(*text_of(right));
    return {Value::Text{std::make_shared<const PromptText>(std::move(out))}};
  }

  Value combined(const std::string& op, const Value& left, const Value& right, std::size_t line) {
    for (const Value* value : {&left, &right}) {
      if (const auto* missing = std::get_if<Undefined>(&value->held))
        fail(line, "'" + missing->name + "' is undefined");
    }
    const auto a = number_of(left);
    const auto b = number_of(right);
    if (a && b) return arithmetic(op, *a, *b, line);
    if (op == "+" && text_of(left) != nullptr && text_of(right) != nullptr) return joined(left, right);
    const auto* some = std::get_if<List>(&left.held);
    const auto* more = std::get_if<List>(&right.held);
    if (op == "+" && some != nullptr && more != nullptr && some->is_tuple == more->is_tuple) {
      Values items = *some->items;
      items.insert(items.end(), more->items->begin(), more->items->end());
      return list(std::move(items), some->is_tuple);
    }
    if (op == "*" && text_of(left) != nullptr && b) {
      PromptText out;
      for (std::int64_t i = 0; i < *b; ++i) {
        step(line, 1);
        charge(text_of(left)->size());
        out.append(*text_of(left));
      }
      return text_value(std::move(out));
    }
    fail(line, "'" + op + "' between " + std::string(kind_of(left)) + " and " + std::string(kind_of(right)) +
                   " is not supported here or means nothing");
  }

  static Value arithmetic(const std::string& op, std::int64_t a, std::int64_t b, std::size_t line) {
    std::int64_t out = 0;
    bool is_large = false;
    if (op == "+") {
      is_large = __builtin_add_overflow(a, b, &out);
    } else if (op == "-") {
      is_large = __builtin_sub_overflow(a, b, &out);
    } else if (op == "*") {
      is_large = __builtin_mul_overflow(a, b, &out);
    } else if (op == "//" || op == "%") {
      if (b == 0) fail(line, "a division by zero");
      is_large = b == -1 && a == std::numeric_limits<std::int64_t>::min();
      if (!is_large) {
        const bool is_below = a % b != 0 && (a < 0) != (b < 0);  // Python rounds down
        out = op == "%" ? a % b + (is_below ? b : 0) : a / b - (is_below ? 1 : 0);
      }
    } else {
      not_here(line, "'" + op + "' between numbers");
    }
    if (is_large) not_here(line, "a number beyond 64 bits");
    return number(out);
  }

  Value evaluate_joined(const Expression& e, const std::shared_ptr<Scope>& scope) {
    Value value = evaluate(*e.parts[0], scope);
    for (std::size_t at = 1; at < e.parts.size() && is_true(value) == (e.form == Form::all_of); ++at) {
      value = evaluate(*e.parts[at], scope);
    }
    return value;
  }

  Value evaluate_sign(const Expression& e, const std::shared_ptr<Scope>& scope) {
    const Value value = evaluate(*e.parts[0], scope);
    const auto of = number_of(value);
    if (!of) fail(e.line, "a sign before " + std::string(kind_of(value)));
    return e.form == Form::minus ? arithmetic("-", 0, *of, e.line) : number(*of);
  }

  Value evaluate_comparison(const Expression& e, const std::shared_ptr<Scope>& scope) {
    Value left = evaluate(*e.parts[0], scope);
    for (std::size_t at = 0; at < e.ops.size(); ++at) {
      Value right = evaluate(*e.parts[at + 1], scope);
      if (!compares(e.ops[at], left, right, e.line)) return {false};
      left = std::move(right);
    }
    return {true};
  }

  bool compares(const std::string& op, const Value& left, const Value& right, std::size_t line) {
    if (op == "==") return equal(left, right, line);
    if (op == "!=") return !equal(left, right, line);
    if (op == "in") return contains(right, left, line);
    if (op == "not in") return !contains(right, left, line);
    int order = 0;
    const auto a = number_of(left);
    const auto b = number_of(right);
    if (a && b) {
      order = *a < *b ? -1 : *a > *b ? 1 : 0;
    } else if (text_of(left) != nullptr && text_of(right) != nullptr) {
      order = text_of(left)->text().compare(text_of(right)->text());
    } else {
      fail(line,
           "'" + op + "' between " + std::string(kind_of(left)) + " and " + std::string(kind_of(right)));
    }
    if (op == "<") return order < 0;
    if (op == "<=") return order <= 0;
    return op == ">" ? order > 0 : order >= 0;
  }

  bool equal(const Value& left, const Value& right, std::size_t line) {
    const Deeper deeper{*this, line};
    const auto a = number_of(left);
    const auto b = number_of(right);
    if (a || b) return a && b && *a == *b;
    if (left.held.index() != right.held.index()) return false;
    if (const PromptText* text = text_of(left)) return text->text() == text_of(right)->text();
    if (holds<None>(left) || holds<Undefined>(left)) return true;
    if (const auto* some = std::get_if<List>(&left.held)) {
      const auto& other = std::get<List>(right.held);
      return some->is_tuple == other.is_tuple &&
             std::equal(some->items->begin(), some->items->end(), other.items->begin(), other.items->end(),
                        [&](const Value& x, const Value& y) { return equal(x, y, line); });
    }
    if (const auto* some = std::get_if<Mapping>(&left.held)) {
      const auto& other = std::get<Mapping>(right.held);
      return some->entries->size() == other.entries->size() &&
             std::all_of(some->entries->begin(), some->entries->end(), [&](const auto& entry) {
               const Value* found = find_entry(other, text_of(entry.first)->text(), line);
               return found != nullptr && equal(entry.second, *found, line);
             });
    }
    not_here(line, "comparing " + std::string(kind_of(left)) + "s");
  }

  bool contains(const Value& in, const Value& what, std::size_t line) {
    if (const PromptText* text = text_of(in)) {
      if (text_of(what) == nullptr) fail(line, "'in' of " + std::string(kind_of(what)) + " in a text");
      charge(text->size());
      return text->text().find(text_of(what)->text()) != std::string::npos;
    }
    if (const auto* mapping = std::get_if<Mapping>(&in.held)) {
      return text_of(what) != nullptr && find_entry(*mapping, text_of(what)->text(), line) != nullptr;
    }
    const Values items = items_of(in, line);
    return std::any_of(items.begin(), items.end(),
                       [&](const Value& item) { return equal(item, what, line); });
  }

  const Value* find_entry(const Mapping& mapping, std::string_view key, std::size_t line) {
    step(line, mapping.entries->size() / 8);
    for (const auto& [known, value] : *mapping.entries) {
      if (text_of(known)->text() == key) return &value;
    }
    return nullptr;
  }

  // What a loop goes over.
  Values items_of(const Value& value, std::size_t line) {
    if (holds<Undefined>(value)) return {};
    if (const auto* list = std::get_if<List>(&value.held)) {
      charge(list->items->size() * 8);
      return *list->items;
    }
    if (const auto* stream = std::get_if<Stream>(&value.held)) {
      if (!*stream->items) not_here(line, "going twice over what map, select or reverse gave");
      Values items = *std::exchange(*stream->items, std::nullopt);
      return items;
    }
    Values out;
    if (const auto* mapping = std::get_if<Mapping>(&value.held)) {
      for (const auto& [key, held] : *mapping->entries) out.push_back(key);
      return out;
    }
    if (const PromptText* text = text_of(value)) {
      step(line, text->size());
      std::size_t at = 0;
      for (const std::string_view character : characters(text->text())) {
        out.push_back(part_of(*text, at, character.size()));
        at += character.size();
      }
      return out;
    }
    fail(line, std::string(kind_of(value)) + " cannot be gone over");
  }

  // What `{{ }}` and `~` write.
  Value printable(const Value& value, std::size_t line) {
    if (text_of(value) != nullptr) return value;
    if (holds<Undefined>(value)) return text("");
    if (holds<None>(value)) return text("None");
    if (const auto* truth = std::get_if<bool>(&value.held)) return text(*truth ? "True" : "False");
    if (const auto* number = std::get_if<std::int64_t>(&value.held)) return text(std::to_string(*number));
    not_here(line, "writing " + std::string(kind_of(value)));
  }

  // ---- attributes, items, slices

  static bool is_method(std::string_view name, std::string_view known) {
    const std::string padded = " " + std::string(name) + " ";
    return known.find(padded) != std::string_view::npos;
  }

  Value attribute_of(const Value& of, const std::string& name, std::size_t line) {
    if (const auto* missing = std::get_if<Undefined>(&of.held)) {
      fail(line, "'" + missing->name + "' is undefined, so it has no '" + name + "'");
    }
    if (name.starts_with('_')) not_here(line, "the attribute '" + name + "'");
    const Value method{Function{.name = name, .of = std::make_shared<const Value>(of)}};
    if (text_of(of) != nullptr) {
      constexpr std::string_view methods =
          " capitalize casefold center count encode endswith expandtabs find format format_map index isalnum "
          "isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle "
          "isupper "
          "join ljust lower lstrip maketrans partition removeprefix removesuffix replace rfind rindex rjust "
          "rpartition rsplit rstrip split splitlines startswith strip swapcase title translate upper zfill ";
      return is_method(name, methods) ? method : undefined(name);
    }
    if (const auto* mapping = std::get_if<Mapping>(&of.held)) {
      constexpr std::string_view methods =
          " clear copy fromkeys get items keys pop popitem setdefault update values ";
      if (is_method(name, methods)) return method;
      const Value* found = find_entry(*mapping, name, line);
      return found != nullptr ? *found : undefined(name);
    }
    if (holds<List>(of)) {
      constexpr std::string_view methods =
          " append clear copy count extend index insert pop remove reverse sort ";
      return is_method(name, methods) ? method : undefined(name);
    }
    if (const auto* space = std::get_if<Namespace>(&of.held)) {
      const auto found = space->names->find(name);
      return found != space->names->end() ? found->second : undefined(name);
    }
    if (const auto* loop = std::get_if<Loop>(&of.held)) return loop_attribute(*loop, name, method, line);
    if (holds<None>(of)) return undefined(name);
    not_here(line, "the attribute '" + name + "' of " + std::string(kind_of(of)));
  }

  static Value loop_attribute(const Loop& loop, const std::string& name, const Value& method,
                              std::size_t line) {
    const std::size_t count = loop.items->size();
    if (name == "index") return number(loop.index + 1);
    if (name == "index0") return number(loop.index);
    if (name == "revindex") return number(count - loop.index);
    if (name == "revindex0") return number(count - loop.index - 1);
    if (name == "first") return {loop.index == 0};
    if (name == "last") return {loop.index + 1 == count};
    if (name == "length") return number(count);
    if (name == "previtem")
      return loop.index == 0 ? undefined("loop.previtem") : (*loop.items)[loop.index - 1];
    if (name == "nextitem") {
      return loop.index + 1 == count ? undefined("loop.nextitem") : (*loop.items)[loop.index + 1];
    }
    if (name == "cycle") return method;
    not_here(line, "'loop." + name + "'");
  }

  Value item_of(const Value& of, const Value& key, std::size_t line) {
    if (const auto* missing = std::get_if<Undefined>(&of.held)) {
      fail(line, "'" + missing->name + "' is undefined, so it has no items");
    }
    if (const PromptText* name = text_of(key)) {
      if (const auto* mapping = std::get_if<Mapping>(&of.held)) {
        if (const Value* found = find_entry(*mapping, name->text(), line)) return *found;
      }
      return attribute_of(of, name->text(), line);
    }
    const auto index = number_of(key);
    if (!index) not_here(line, std::string(kind_of(key)) + " as a subscript");
    if (const auto* list = std::get_if<List>(&of.held)) {
      const auto count = static_cast<std::int64_t>(list->items->size());
      const std::int64_t at = *index < 0 ? *index + count : *index;
      if (at < 0 || at >= count) return undefined("the item " + std::to_string(*index) + " of a list");
      return (*list->items)[static_cast<std::size_t>(at)];
    }
    if (const PromptText* text = text_of(of)) {
      charge(text->size());
      const std::vector<std::string_view> all = characters(text->text());
      const auto count = static_cast<std::int64_t>(all.size());
      const std::int64_t at = *index < 0 ? *index + count : *index;
      if (at < 0 || at >= count) return undefined("the character " + std::to_string(*index) + " of a text");
      const std::string_view character = all[static_cast<std::size_t>(at)];
      return part_of(*text, static_cast<std::size_t>(character.data() - text->text().data()),
                     character.size());
    }
    if (holds<Mapping>(of) || holds<None>(of)) return undefined("an item");
    not_here(line, "a subscript of " + std::string(kind_of(of)));
  }

  Value evaluate_item(const Expression& e, const std::shared_ptr<Scope>& scope) {
    const Value of = evaluate(*e.parts[0], scope);
    return item_of(of, evaluate(*e.parts[1], scope), e.line);
  }

  Value evaluate_slice(const Expression& e, const std::shared_ptr<Scope>& scope) {
    const Value of = evaluate(*e.parts[0], scope);
    std::array<std::optional<std::int64_t>, 3> given;
    for (std::size_t part = 0; part < 3; ++part) {
      if (!e.parts[part + 1]) continue;
      const Value value = evaluate(*e.parts[part + 1], scope);
      if (holds<None>(value)) continue;
      given[part] = number_of(value);
      if (!given[part]) fail(e.line, "a slice from or to " + std::string(kind_of(value)));
    }
    const auto* list_held = std::get_if<List>(&of.held);
    const PromptText* text_held = text_of(of);
    if (list_held == nullptr && text_held == nullptr) fail(e.line, "a slice of " + std::string(kind_of(of)));
    std::vector<std::string_view> all;
    if (text_held != nullptr) {
      charge(text_held->size());
      all = characters(text_held->text());
    }
    const auto count =
        static_cast<std::int64_t>(text_held != nullptr ? all.size() : list_held->items->size());
    const std::int64_t stride = given[2].value_or(1);
    if (stride == 0) fail(e.line, "a slice with a step of 0");
    const std::int64_t low = stride > 0 ? 0 : -1;
    const auto bound = [&](std::optional<std::int64_t> at, std::int64_t otherwise) {
      if (!at) return otherwise;
      return std::clamp(*at < 0 ? *at + count : *at, low, stride > 0 ? count : count - 1);
    };
    const std::int64_t from = bound(given[0], stride > 0 ? 0 : count - 1);
    const std::int64_t to = bound(given[1], stride > 0 ? count : -1);
    Values items;
    PromptText out;
    // A step beyond the count takes one: no sum of it can wrap then.
    const std::int64_t move = std::clamp(stride, -count - 1, count + 1);
    for (std::int64_t at = from; stride > 0 ? at < to : at > to; at += move) {
      step(e.line, 1);
      if (list_held != nullptr) {
        items.push_back((*list_held->items)[static_cast<std::size_t>(at)]);
      } else {
        const std::string_view character = all[static_cast<std::size_t>(at)];
        out.append(text_held->substr(static_cast<std::size_t>(character.data() - text_held->text().data()),
                                     character.size()));
      }
    }
    return list_held != nullptr ? list(std::move(items), list_held->is_tuple) : text_value(std::move(out));
  }

  // ---- calls

  // The arguments by the names that the function gives them; nothing where one is left out.
  Values take_arguments(Arguments given, std::initializer_list<std::string_view> names,
                        const std::string& function, std::size_t line) {
    Values out;
    for (const std::string_view name : names) {
      const std::size_t place = out.size();
      out.push_back(place < given.by_place.size() ? std::move(given.by_place[place])
                                                  : undefined(std::string(name)));
    }
    bool fits = given.by_place.size() <= names.size();
    for (auto& [name, value] : given.by_name) {
      const auto at = static_cast<std::size_t>(std::find(names.begin(), names.end(), name) - names.begin());
      fits = fits && at < names.size() && at >= given.by_place.size();
      if (fits) out[at] = std::move(value);
    }
    if (!fits) not_here(line, "an argument that '" + function + "' is given");
    return out;
  }

  Value evaluate_call(const Expression& e, const std::shared_ptr<Scope>& scope) {
    const Value callee = evaluate(*e.parts[0], scope);
    Arguments arguments = evaluate_arguments(e, scope);
    if (const auto* macro = std::get_if<Macro>(&callee.held))
      return call_macro(*macro, std::move(arguments), e.line);
    const auto* function = std::get_if<Function>(&callee.held);
    if (function == nullptr) {
      const auto* missing = std::get_if<Undefined>(&callee.held);
      fail(e.line, missing != nullptr ? "'" + missing->name + "' is undefined, so it cannot be called"
                                      : std::string(kind_of(callee)) + " cannot be called");
    }
    if (function->of) return call_method(*function->of, function->name, std::move(arguments), e.line);
    return call_function(function->name, std::move(arguments), e.line);
  }

  Value call_macro(const Macro& macro, Arguments given, std::size_t line) {
    const Deeper deeper{*this, line};
    const Statement& definition = *macro.definition;
    const std::size_t count = definition.parameters.size();
    if (given.by_place.size() > count)
      fail(line, "macro '" + definition.text + "' is given too many arguments");
    const auto around = macro.around.lock();
    if (!around) not_here(line, "a macro of a block that has ended");
    const auto scope = std::make_shared<Scope>(Scope{.names = {}, .around = around});
    for (auto& named : given.by_name) {
      const std::string& name = named.first;
      const auto known = std::find_if(definition.parameters.begin(), definition.parameters.end(),
                                      [&](const Parameter& parameter) { return parameter.name == name; });
      const auto place = static_cast<std::size_t>(known - definition.parameters.begin());
      if (place == count || place < given.by_place.size()) {
        fail(line, "macro '" + definition.text + "' takes no '" + name + "' here");
      }
      set(*scope, name, std::move(named.second));
    }
    for (std::size_t place = 0; place < count; ++place) {
      const Parameter& parameter = definition.parameters[place];
      if (place < given.by_place.size()) {
        set(*scope, parameter.name, std::move(given.by_place[place]));
      } else if (!scope->names.contains(parameter.name)) {
        set(*scope, parameter.name,
            parameter.otherwise ? evaluate(*parameter.otherwise, scope) : undefined(parameter.name));
      }
    }
    PromptText out;
    run(definition.blocks[0], scope, out);
    return text_value(std::move(out));
  }

  Value call_function(const std::string& name, Arguments given, std::size_t line) {
    if (name == "raise_exception") {
      const Values arguments = take_arguments(std::move(given), {"message"}, name, line);
      throw Error("the model's chat template refuses the messages: " +
                  text_of(printable(arguments[0], line))->text());
    }
    if (name == "range") {
      std::vector<std::int64_t> bounds;
      for (const Value& value : given.by_place) {
        const auto bound = number_of(value);
        if (!bound) fail(line, "range of " + std::string(kind_of(value)));
        bounds.push_back(*bound);
      }
      if (bounds.empty() || bounds.size() > 3 || !given.by_name.empty())
        fail(line, "range takes 1 to 3 numbers");
      if (bounds.size() == 1) bounds.insert(bounds.begin(), 0);
      if (bounds.size() == 2) bounds.push_back(1);
      const std::int64_t by = bounds[2];
      if (by == 0) fail(line, "range with a step of 0");
      Values items;
      for (std::int64_t at = bounds[0]; by > 0 ? at < bounds[1] : at > bounds[1];) {
        items.push_back(number(at));
        if (static_cast<std::int64_t>(items.size()) > most_range || __builtin_add_overflow(at, by, &at)) {
          fail(line, "range gives more than " + std::to_string(most_range) + " numbers");
        }
      }
      step(line, items.size());
      return list(std::move(items));
    }
    if (name == "namespace" && given.by_place.empty()) {
      auto names = std::make_shared<std::map<std::string, Value>>();
      for (auto& [key, value] : given.by_name) {
        if (holds<Namespace>(value)) not_here(line, "a namespace inside a namespace");
        names->insert_or_assign(key, std::move(value));
      }
      return {Namespace{std::move(names)}};
    }
    if (name == "dict" && given.by_place.empty()) {
      std::vector<std::pair<Value, Value>> entries;
      for (auto& [key, value] : given.by_name) entries.emplace_back(text(key), std::move(value));
      return mapping(std::move(entries));
    }
    not_here(line, "'" + name + "' with these arguments");
  }

  Value call_method(const Value& of, const std::string& name, Arguments given, std::size_t line) {
    if (const PromptText* held = text_of(of)) return call_text_method(*held, name, std::move(given), line);
    if (const auto* loop = std::get_if<Loop>(&of.held)) {
      if (given.by_place.empty() || !given.by_name.empty()) fail(line, "loop.cycle takes values");
      return given.by_place[loop->index % given.by_place.size()];
    }
    const auto* mapping = std::get_if<Mapping>(&of.held);
    if (mapping != nullptr && name == "get") {
      if (given.by_place.empty()) fail(line, "'get' needs a key");
      const Values arguments = take_arguments(std::move(given), {"key", "default"}, name, line);
      const PromptText* key = text_of(arguments[0]);
      const Value* found = key == nullptr ? nullptr : find_entry(*mapping, key->text(), line);
      if (found != nullptr) return *found;
      return holds<Undefined>(arguments[1]) ? Value{None{}} : arguments[1];
    }
    if (mapping != nullptr && given.by_place.empty() && given.by_name.empty()) {
      if (name == "items") return list(entries_of(*mapping));
      if (name == "keys" || name == "values") {
        Values out;
        for (const auto& [key, value] : *mapping->entries) out.push_back(name == "keys" ? key : value);
        return list(std::move(out));
      }
    }
    not_here(line, "'" + name + "' of " + std::string(kind_of(of)));
  }

  Values entries_of(const Mapping& mapping) {
    Values out;
    for (const auto& [key, value] : *mapping.entries) out.push_back(list({key, value}, true));
    return out;
  }

  const PromptText& text_argument(const Value& value, const std::string& function, std::size_t line) {
    const PromptText* text = text_of(value);
    if (text == nullptr) fail(line, "'" + function + "' needs a text, not " + std::string(kind_of(value)));
    return *text;
  }

  Value strip(const PromptText& text, const Value& what, bool left, bool right, const std::string& name,
              std::size_t line) {
    charge(text.size());
    Stretch kept;
    if (holds<Undefined>(what) || holds<None>(what)) {
      kept = stripped(text.text(), left, right, is_space);
    } else {
      const std::vector<std::string_view> drop = characters(text_argument(what, name, line).text());
      if (drop.size() > 1000) not_here(line, "'" + name + "' of more than 1000 characters");
      kept = stripped(text.text(), left, right, [&](std::string_view character) {
        return std::find(drop.begin(), drop.end(), character) != drop.end();
      });
    }
    return part_of(text, kept.begin, kept.end - kept.begin);
  }

  // Other letters have rules of their own, in tables that only Python has here.
  Value cased(const PromptText& text, const std::string& name, std::size_t line, bool is_filter = false) {
    charge(text.size());
    if (!is_ascii(text.text())) not_here(line, "'" + name + "' of letters beyond a to z");
    std::string out = text.text();
    bool is_first = true;
    for (char& c : out) {
      if (name == "upper") {
        c = upper(c);
      } else if (name == "lower" || !is_first) {
        c = lower(c);
      } else {
        c = upper(c);
      }
      if (name == "capitalize") is_first = false;
      // The filter begins a word where a blank or a bracket stood before, the method where no letter stood.
      if (name == "title")
        is_first =
            is_filter ? std::string_view("-({[< \t\n\v\f\r\x1C\x1D\x1E\x1F").find(c) != std::string_view::npos
                      : !is_letter(c);
    }
    return text_value(text.with_text(std::move(out)));
  }

  Value split(const PromptText& text, const Value& by, std::int64_t most, std::size_t line) {
    charge(text.size());
    Values out;
    const std::string& whole = text.text();
    std::size_t at = 0;
    if (holds<Undefined>(by) || holds<None>(by)) {
      const auto skip = [&](bool space) {
        while (at < whole.size() &&
               is_space(std::string_view(whole).substr(at, length_at(whole, at))) == space) {
          at += length_at(whole, at);
        }
      };
      for (skip(true); at < whole.size(); skip(true)) {
        step(line, 1);
        if (most >= 0 && static_cast<std::int64_t>(out.size()) == most) {
          const Stretch kept = stripped(std::string_view(whole).substr(at), false, true, is_space);
          out.push_back(part_of(text, at, kept.end));
          break;
        }
        const std::size_t begin = at;
        skip(false);
        out.push_back(part_of(text, begin, at - begin));
      }
      return list(std::move(out));
    }
    const std::string& separator = text_argument(by, "split", line).text();
    if (separator.empty()) fail(line, "'split' by an empty text");
    for (std::size_t found = whole.find(separator); found != std::string::npos;
         found = whole.find(separator, at)) {
      if (most >= 0 && static_cast<std::int64_t>(out.size()) == most) break;
      step(line, 1);
      out.push_back(part_of(text, at, found - at));
      at = found + separator.size();
    }
    out.push_back(part_of(text, at, whole.size() - at));
    return list(std::move(out));
  }

  Value replace(const PromptText& text, const Value& what, const Value& with, const Value& count,
                std::size_t line) {
    charge(text.size());
    const std::string& old = text_argument(what, "replace", line).text();
    const PromptText& other = text_argument(with, "replace", line);
    if (old.empty()) not_here(line, "'replace' of an empty text");
    std::int64_t left = holds<Undefined>(count) || holds<None>(count) ? -1 : number_of(count).value_or(-2);
    if (left == -2) fail(line, "'replace' so many times: " + std::string(kind_of(count)));
    PromptText out;
    std::size_t at = 0;
    for (std::size_t found = text.text().find(old); found != std::string::npos && left != 0;
         found = text.text().find(old, at), --left) {
      step(line, 1);
      charge(other.size());
      out.append(text.substr(at, found - at)).append(other);
      at = found + old.size();
    }
    out.append(text.substr(at));
    return text_value(std::move(out));
  }

  Value join(const Values& items, const PromptText& between, bool only_texts, std::size_t line) {
    PromptText out;
    for (std::size_t at = 0; at < items.size(); ++at) {
      step(line, 1);
      if (only_texts) text_argument(items[at], "join", line);
      const Value item = printable(items[at], line);
      charge(text_of(item)->size() + between.size());
      if (at > 0) out.append(between);
      out.append(*text_of(item));
    }
    return text_value(std::move(out));
  }

  bool begins_or_ends(const PromptText& text, const Value& with, bool begins, std::size_t line) {
    if (const auto* list = std::get_if<List>(&with.held); list != nullptr && list->is_tuple) {
      return std::any_of(list->items->begin(), list->items->end(),
                         [&](const Value& one) { return begins_or_ends(text, one, begins, line); });
    }
    const std::string& part = text_argument(with, begins ? "startswith" : "endswith", line).text();
    step(line, 1);
    return begins ? text.text().starts_with(part) : text.text().ends_with(part);
  }

  Value call_text_method(const PromptText& text, const std::string& name, Arguments given, std::size_t line) {
    if (!given.by_name.empty()) not_here(line, "'" + name + "' with named arguments");
    const std::size_t count = given.by_place.size();
    const auto take = [&](std::size_t least, std::size_t most) {
      if (count < least || count > most)
        not_here(line, "'" + name + "' with " + std::to_string(count) + " arguments");
      Values out = std::move(given.by_place);
      while (out.size() < most) out.push_back(undefined(name));
      return out;
    };
    if (name == "strip" || name == "lstrip" || name == "rstrip") {
      return strip(text, take(0, 1)[0], name != "rstrip", name != "lstrip", name, line);
    }
    if (name == "upper" || name == "lower" || name == "title" || name == "capitalize") {
      take(0, 0);
      return cased(text, name, line);
    }
    if (name == "startswith" || name == "endswith") {
      return {begins_or_ends(text, take(1, 1)[0], name == "startswith", line)};
    }
    if (name == "split") {
      const Values arguments = take(0, 2);
      const auto most =
          holds<Undefined>(arguments[1]) ? std::int64_t{-1} : number_of(arguments[1]).value_or(-2);
      if (most == -2) fail(line, "'split' so many times: " + std::string(kind_of(arguments[1])));
      return split(text, arguments[0], most, line);
    }
    if (name == "replace") {
      const Values arguments = take(2, 3);
      return replace(text, arguments[0], arguments[1], arguments[2], line);
    }
    if (name == "join") return join(items_of(take(1, 1)[0], line), text, true, line);
    if (name == "find") {
      charge(text.size());
      const Values arguments = take(1, 1);
      const std::size_t found = text.text().find(text_argument(arguments[0], name, line).text());
      if (found == std::string::npos) return number(std::int64_t{-1});
      return number(characters(std::string_view(text.text()).substr(0, found)).size());
    }
    if (name == "removeprefix" || name == "removesuffix") {
      const Values arguments = take(1, 1);
      const std::string& part = text_argument(arguments[0], name, line).text();
      const bool is_there =
          name == "removeprefix" ? text.text().starts_with(part) : text.text().ends_with(part);
      const std::size_t cut = is_there ? part.size() : 0;
      return part_of(text, name == "removeprefix" ? cut : 0, text.size() - cut);
    }
    not_here(line, "the method '" + name + "' of a text");
  }

  // ---- filters and tests

  Value evaluate_filter(const Expression& e, const std::shared_ptr<Scope>& scope) {
    const Value value = evaluate(*e.parts[0], scope);
    return apply_filter(e.name, value, evaluate_arguments(e, scope), e.line);
  }

  std::size_t length_of(const Value& value, std::size_t line) {
    if (holds<Undefined>(value)) return 0;
    if (const auto* list = std::get_if<List>(&value.held)) return list->items->size();
    if (const auto* mapping = std::get_if<Mapping>(&value.held)) return mapping->entries->size();
    if (const PromptText* text = text_of(value)) {
      charge(text->size());
      return characters(text->text()).size();
    }
    fail(line, std::string(kind_of(value)) + " has no length");
  }

  Value apply_filter(const std::string& name, const Value& value, Arguments given, std::size_t line) {
    const Deeper deeper{*this, line};
    const auto take = [&](std::initializer_list<std::string_view> names) {
      return take_arguments(std::move(given), names, name, line);
    };
    const auto as_text = [&]() { return printable(value, line); };
    if (name == "trim") {
      const Values arguments = take({"chars"});
      const Value held = as_text();
      return strip(*text_of(held), arguments[0], true, true, name, line);
    }
    if (name == "upper" || name == "lower" || name == "title" || name == "capitalize") {
      take({});
      const Value held = as_text();
      return cased(*text_of(held), name, line, true);
    }
    if (name == "length" || name == "count") {
      take({});
      return number(length_of(value, line));
    }
    if (name == "default" || name == "d") {
      const Values arguments = take({"default_value", "boolean"});
      const bool is_used = holds<Undefined>(value) || (is_true(arguments[1]) && !is_true(value));
      if (!is_used) return value;
      return holds<Undefined>(arguments[0]) ? text("") : arguments[0];
    }
    if (name == "string") {
      take({});
      return as_text();
    }
    if (name == "replace") {
      const Values arguments = take({"old", "new", "count"});
      const Value held = as_text();
      return replace(*text_of(held), arguments[0], arguments[1], arguments[2], line);
    }
    if (name == "join") {
      const Values arguments = take({"d"});
      const Value between = printable(arguments[0], line);
      return join(items_of(value, line), *text_of(between), false, line);
    }
    if (name == "list") {
      take({});
      return list(items_of(value, line));
    }
    if (name == "first" || name == "last") {
      take({});
      if (name == "last" && (holds<Stream>(value) || holds<Undefined>(value)))
        not_here(line, "'last' of a stream");
      const Values items = items_of(value, line);
      if (items.empty()) return undefined("the " + name + " of nothing");
      return name == "first" ? items.front() : items.back();
    }
    if (name == "reverse") {
      take({});
      Values items = items_of(value, line);
      std::reverse(items.begin(), items.end());
      if (text_of(value) != nullptr) return join(items, PromptText(), false, line);
      if (!holds<List>(value)) not_here(line, "'reverse' of " + std::string(kind_of(value)));
      return stream(std::move(items));
    }
    if (name == "items") {
      take({});
      if (holds<Undefined>(value)) return stream({});
      const auto* held = std::get_if<Mapping>(&value.held);
      if (held == nullptr) fail(line, "'items' of " + std::string(kind_of(value)));
      return stream(entries_of(*held));
    }
    if (name == "int" && number_of(value)) {
      take({});
      return number(*number_of(value));
    }
    if (name == "map") return map(value, std::move(given), line);
    if (name == "select" || name == "reject" || name == "selectattr" || name == "rejectattr") {
      return select(name, value, std::move(given), line);
    }
    not_here(line, "the filter '" + name + "'");
  }

  // `a.b` of an item, as filters take it.
  Value path_of(const Value& item, const Value& path, std::size_t line) {
    if (number_of(path)) return item_of(item, path, line);
    const std::string& names = text_argument(path, "attribute", line).text();
    Value value = item;
    for (std::size_t at = 0; at <= names.size();) {
      const std::size_t end = std::min(names.find('.', at), names.size());
      const std::string part = names.substr(at, end - at);
      if (part.empty() || is_digit(part[0])) not_here(line, "the attribute '" + part + "'");
      value = item_of(value, text(part), line);
      at = end + 1;
    }
    return value;
  }

  Value map(const Value& value, Arguments given, std::size_t line) {
    Values out;
    if (given.by_place.empty()) {
      const Values arguments = take_arguments(std::move(given), {"attribute"}, "map", line);
      for (const Value& item : items_of(value, line)) out.push_back(path_of(item, arguments[0], line));
      return stream(std::move(out));
    }
    const std::string filter = text_argument(given.by_place[0], "map", line).text();
    given.by_place.erase(given.by_place.begin());
    for (const Value& item : items_of(value, line)) out.push_back(apply_filter(filter, item, given, line));
    return stream(std::move(out));
  }

  Value select(const std::string& name, const Value& value, Arguments given, std::size_t line) {
    if (!given.by_name.empty()) not_here(line, "'" + name + "' with named arguments");
    const bool by_attribute = name.ends_with("attr");
    const bool keeps = name.starts_with("select");
    Values arguments = std::move(given.by_place);
    Value path{None{}};
    if (by_attribute) {
      if (arguments.empty()) fail(line, "'" + name + "' needs an attribute");
      path = arguments[0];
      arguments.erase(arguments.begin());
    }
    std::string test;
    if (!arguments.empty()) {
      test = text_argument(arguments[0], name, line).text();
      arguments.erase(arguments.begin());
    }
    Values out;
    for (Value& item : items_of(value, line)) {
      const Value looked_at = by_attribute ? path_of(item, path, line) : item;
      const bool passes = test.empty() ? is_true(looked_at) : passes_test(test, looked_at, arguments, line);
      if (passes == keeps) out.push_back(std::move(item));
    }
    return stream(std::move(out));
  }

  Value evaluate_test(const Expression& e, const std::shared_ptr<Scope>& scope) {
    const Value value = evaluate(*e.parts[0], scope);
    Arguments arguments = evaluate_arguments(e, scope);
    if (!arguments.by_name.empty()) not_here(e.line, "the test '" + e.name + "' with named arguments");
    return {passes_test(e.name, value, arguments.by_place, e.line)};
  }

  bool passes_test(const std::string& name, const Value& value, const Values& arguments, std::size_t line) {
    const Deeper deeper{*this, line};
    static const std::map<std::string, std::string, std::less<>> comparisons = {
        {"eq", "=="},      {"equalto", "=="}, {"==", "=="},         {"ne", "!="}, {"!=", "!="}, {"lt", "<"},
        {"lessthan", "<"}, {"<", "<"},        {"le", "<="},         {"<=", "<="}, {"gt", ">"},  {">", ">"},
        {"ge", ">="},      {">=", ">="},      {"greaterthan", ">"}, {"in", "in"}};
    const auto comparison = comparisons.find(name);
    const bool takes_one = comparison != comparisons.end() || name == "divisibleby";
    if (arguments.size() != (takes_one ? 1U : 0U)) {
      not_here(line, "the test '" + name + "' with " + std::to_string(arguments.size()) + " arguments");
    }
    if (comparison != comparisons.end()) return compares(comparison->second, value, arguments[0], line);
    if (name == "defined") return !holds<Undefined>(value);
    if (name == "undefined") return holds<Undefined>(value);
    if (name == "none") return holds<None>(value);
    if (name == "string") return text_of(value) != nullptr;
    if (name == "mapping") return holds<Mapping>(value);
    if (name == "boolean") return holds<bool>(value);
    if (name == "integer") return holds<std::int64_t>(value);
    if (name == "number") return number_of(value).has_value();
    if (name == "float") return false;
    const auto* truth = std::get_if<bool>(&value.held);
    if (name == "true") return truth != nullptr && *truth;
    if (name == "false") return truth != nullptr && !*truth;
    if (name == "callable") return holds<Macro>(value) || holds<Function>(value) || holds<Undefined>(value);
    const bool has_length =
        text_of(value) != nullptr || holds<List>(value) || holds<Mapping>(value) || holds<Undefined>(value);
    if (name == "sequence" && !holds<Loop>(value)) return has_length;
    if (name == "iterable") return has_length || holds<Stream>(value) || holds<Loop>(value);
    const auto of = number_of(value);
    if (of && (name == "odd" || name == "even")) return (*of % 2 != 0) == (name == "odd");
    if (of && name == "divisibleby" && number_of(arguments[0]).value_or(0) > 0)
      return *of % *number_of(arguments[0]) == 0;
    not_here(line, "the test '" + name + "' of " + std::string(kind_of(value)));
  }

  std::size_t calls_ = 0;
  std::size_t steps_ = 0;
  std::size_t bytes_left_;
};

}  // namespace
}  // namespace jinja

struct JinjaTemplate::Program {
  jinja::Block block;
};

JinjaTemplate::JinjaTemplate(std::string_view source)
    : program_{std::make_unique<const Program>(Program{jinja::parse(source)})} {}
JinjaTemplate::~JinjaTemplate() = default;
JinjaTemplate::JinjaTemplate(JinjaTemplate&&) noexcept = default;
JinjaTemplate& JinjaTemplate::operator=(JinjaTemplate&&) noexcept = default;

PromptText JinjaTemplate::render(const Input& input) const {
  using namespace jinja;
  std::size_t bytes = input.bos.size() + input.eos.size();
  for (const ChatMessage& message : input.messages) bytes += message.role.size() + message.content.size();
  Interpreter interpreter{bytes};
  Values messages;
  for (const ChatMessage& message : input.messages) {
    messages.push_back(
        Interpreter::mapping({{interpreter.text("role"), interpreter.text(message.role)},
                              {interpreter.text("content"), interpreter.text(message.content, true)}}));
  }
  const auto globals = std::make_shared<Scope>();
  interpreter.set(*globals, "messages", interpreter.list(std::move(messages)));
  interpreter.set(*globals, "add_generation_prompt", {input.add_generation_prompt});
  interpreter.set(*globals, "bos_token", interpreter.text(input.bos));
  interpreter.set(*globals, "eos_token", interpreter.text(input.eos));
  interpreter.set(*globals, "tools", {None{}});
  interpreter.set(*globals, "documents", {None{}});
  PromptText out;
  const auto scope = std::make_shared<Scope>(Scope{.names = {}, .around = globals});
  interpreter.run(program_->block, scope, out);
  return out;
}

}  // namespace engine
