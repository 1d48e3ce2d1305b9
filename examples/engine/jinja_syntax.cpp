#include "jinja_syntax.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <utility>

#include "error.hpp"
#include "jinja_text.hpp"

namespace engine::jinja {
namespace {

constexpr std::size_t most_depth = 200;  // of brackets and blocks inside each other

// ---- tokens
// ----------------------------------------------------------------------------------------------------

enum class Kind { data, block_begin, block_end, print_begin, print_end, name, text, number, op, end };

struct Token {
  Kind kind = Kind::end;
  std::string text;  // what stands there; a text's with escapes resolved
  std::size_t line = 1;
};

std::string described(const Token& token) {
  switch (token.kind) {
    case Kind::block_end:
    case Kind::print_end:
      return "the end of the tag";
    case Kind::end:
      return "the end of the template";
    default:
      return "'" + token.text.substr(0, 40) + "'";
  }
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) {
    // Jinja reads every line end as \n and drops one at the end.
    source_.reserve(source.size());
    for (std::size_t at = 0; at < source.size(); ++at) {
      if (source[at] == '\r') {
        source_.push_back('\n');
        if (at + 1 < source.size() && source[at + 1] == '\n') ++at;
      } else {
        source_.push_back(source[at]);
      }
    }
    if (source_.ends_with('\n')) source_.pop_back();
  }

  std::vector<Token> tokens() {
    bool line_starts = true;  // whether what comes next begins a line
    while (at_ < source_.size()) {
      const std::size_t tag = find_tag();
      std::string_view data = rest().substr(0, tag - at_);
      if (tag == source_.size()) {
        add(Kind::data, std::string(data));
        advance(data.size());
        break;
      }
      const char kind = source_[tag + 1];
      const char sign = tag + 2 < source_.size() ? source_[tag + 2] : '\0';
      if (sign == '-') {
        data = data.substr(0, stripped(data, false, true, is_space).end);
      } else if (sign != '+' && kind != '{') {
        const std::size_t line = data.rfind('\n') + 1;  // 0 where there is none
        if (line > 0 || line_starts) {
          const Stretch blank = stripped(data.substr(line), true, false, is_space);
          if (blank.begin == data.size() - line) data = data.substr(0, line);
        }
      }
      if (!data.empty()) add(Kind::data, std::string(data));
      advance(tag - at_ + (sign == '-' || sign == '+' ? 3 : 2));
      if (kind == '#') {
        read_comment();
      } else {
        read_tag(kind == '%');
      }
      line_starts = source_[at_ - 1] == '\n';
    }
    add(Kind::end, "");
    return std::move(tokens_);
  }

 private:
  std::string_view rest() const { return std::string_view(source_).substr(at_); }
  void add(Kind kind, std::string text) {
    tokens_.push_back({.kind = kind, .text = std::move(text), .line = line_});
  }
  void advance(std::size_t count) {
    line_ += static_cast<std::size_t>(std::count(source_.begin() + static_cast<std::ptrdiff_t>(at_),
                                                 source_.begin() + static_cast<std::ptrdiff_t>(at_ + count),
                                                 '\n'));
    at_ += count;
  }
  void skip_space() { advance(stripped(rest(), true, false, is_space).begin); }

  std::size_t find_tag() const {
    for (std::size_t at = source_.find('{', at_); at != std::string::npos; at = source_.find('{', at + 1)) {
      const char next = at + 1 < source_.size() ? source_[at + 1] : '\0';
      if (next == '{' || next == '%' || next == '#') return at;
    }
    return source_.size();
  }

  void read_comment() {
    const std::size_t end = source_.find("#}", at_);
    if (end == std::string::npos) fail(line_, "a comment has no end: '#}' is missing");
    const char sign = end > at_ ? source_[end - 1] : '\0';
    advance(end + 2 - at_);
    finish_tag(sign, true);
  }

  // What the end of a tag takes from the text behind it.
  void finish_tag(char sign, bool takes_line_end) {
    if (sign == '-') {
      skip_space();
    } else if (sign != '+' && takes_line_end && rest().starts_with('\n')) {
      advance(1);
    }
  }

  void read_tag(bool is_block) {
    add(is_block ? Kind::block_begin : Kind::print_begin, "");
    const std::string_view closing = is_block ? "%}" : "}}";
    std::string open;  // brackets
    while (true) {
      skip_space();
      const std::string_view text = rest();
      if (text.empty())
        fail(line_, std::string("a tag has no end: '") + std::string(closing) + "' is missing");
      if (open.empty()) {
        const bool is_signed = text[0] == '-' || (is_block && text[0] == '+');
        if (text.substr(is_signed ? 1 : 0).starts_with(closing)) {
          add(is_block ? Kind::block_end : Kind::print_end, "");
          advance(closing.size() + (is_signed ? 1 : 0));
          finish_tag(is_signed ? text[0] : '\0', is_block);
          return;
        }
      }
      const char c = text[0];
      if (is_digit(c)) {
        read_number();
      } else if (is_name(c)) {
        const auto end = std::find_if_not(text.begin(), text.end(), is_name);
        add(Kind::name, std::string(text.begin(), end));
        advance(tokens_.back().text.size());
      } else if (c == '\'' || c == '"') {
        read_text();
      } else {
        read_operator(open);
      }
    }
  }

  void read_number() {
    const std::string_view text = rest();
    const auto digits =
        static_cast<std::size_t>(std::find_if_not(text.begin(), text.end(), is_digit) - text.begin());
    const std::string_view after = text.substr(digits);
    const bool follows_dot =
        !tokens_.empty() && tokens_.back().kind == Kind::op && tokens_.back().text == ".";
    const bool has_fraction = !follows_dot && after.size() > 1 && after[0] == '.' && is_digit(after[1]);
    if (has_fraction || after.starts_with('e') || after.starts_with('E'))
      not_here(line_, "a floating-point number");
    if (digits > 18 || (digits > 1 && text[0] == '0') || (!after.empty() && is_name(after[0]))) {
      not_here(line_,
               "the number '" + std::string(text.substr(0, std::min<std::size_t>(digits + 2, 40))) + "'");
    }
    add(Kind::number, std::string(text.substr(0, digits)));
    advance(digits);
  }

  void read_operator(std::string& open) {
    constexpr auto two = std::to_array<std::string_view>({"//", "**", "==", "!=", ">=", "<="});
    const std::string_view text = rest();
    if (std::find(two.begin(), two.end(), text.substr(0, 2)) != two.end()) {
      add(Kind::op, std::string(text.substr(0, 2)));
      advance(2);
      return;
    }
    const char c = text[0];
    if (std::string_view("+-*/%~[](){}<>=.:|,;").find(c) == std::string_view::npos) {
      fail(line_, "'" + std::string(text.substr(0, length_at(text, 0))) + "' is not expected in a tag");
    }
    if (c == '(' || c == '[' || c == '{') open.push_back(c == '(' ? ')' : static_cast<char>(c + 2));
    if (c == ')' || c == ']' || c == '}') {
      if (open.empty() || open.back() != c) fail(line_, std::string("'") + c + "' closes nothing");
      open.pop_back();
    }
    add(Kind::op, std::string(1, c));
    advance(1);
  }

  // Python's escapes.
  void read_text() {
    const std::string_view text = rest();
    std::string out;
    std::size_t at = 1;
    const auto code_point = [&](std::size_t digits) {
      std::uint32_t value = 0;
      for (std::size_t i = 0; i < digits; ++i, ++at) {
        const char c = at < text.size() ? lower(text[at]) : '\0';
        if (!is_digit(c) && !(c >= 'a' && c <= 'f')) fail(line_, "a text has a broken escape");
        value = value * 16 + static_cast<std::uint32_t>(is_digit(c) ? c - '0' : c - 'a' + 10);
      }
      if (value > 0x10FFFF || (value >= 0xD800 && value <= 0xDFFF))
        not_here(line_, "an escape of a surrogate");
      const auto put = [&](std::uint32_t byte) { out.push_back(static_cast<char>(byte)); };
      if (value < 0x80) {
        put(value);
      } else if (value < 0x800) {
        put(0xC0U | value >> 6U);
        put(0x80U | (value & 0x3FU));
      } else if (value < 0x10000) {
        put(0xE0U | value >> 12U);
        put(0x80U | (value >> 6U & 0x3FU));
        put(0x80U | (value & 0x3FU));
      } else {
        put(0xF0U | value >> 18U);
        put(0x80U | (value >> 12U & 0x3FU));
        put(0x80U | (value >> 6U & 0x3FU));
        put(0x80U | (value & 0x3FU));
      }
    };
    while (at < text.size() && text[at] != text[0]) {
      if (text[at] != '\\' || at + 1 == text.size()) {
        out.push_back(text[at++]);
        continue;
      }
      const char escaped = text[at + 1];
      at += 2;
      constexpr std::string_view from = "abfnrtv\\'\"";
      constexpr std::string_view to = "\a\b\f\n\r\t\v\\'\"";
      const std::size_t simple = from.find(escaped);
      if (simple != std::string_view::npos) {
        out.push_back(to[simple]);
      } else if (escaped == 'x' || escaped == 'u' || escaped == 'U') {
        code_point(escaped == 'x' ? 2 : escaped == 'u' ? 4 : 8);
      } else if (escaped == 'N' || is_digit(escaped)) {
        not_here(line_, std::string("the escape '\\") + escaped + "'");
      } else if (escaped != '\n') {  // which an escape takes away; others are no escapes
        out.append({'\\', escaped});
      }
    }
    if (at >= text.size()) fail(line_, "a text has no end: its closing quote is missing");
    add(Kind::text, std::move(out));
    advance(at + 1);
  }

  std::string source_;
  std::size_t at_ = 0;
  std::size_t line_ = 1;
  std::vector<Token> tokens_;
};

class Parser {
 public:
  explicit Parser(std::string_view source) : tokens_{Lexer{source}.tokens()} {}

  Block program() {
    Block block = parse_block({});
    if (now().kind != Kind::end) fail(now().line, "'" + now().text + "' belongs to nothing");
    return block;
  }

 private:
  struct Deeper {
    Parser& parser;
    explicit Deeper(Parser& p) : parser{p} {
      if (++parser.depth_ > most_depth) {
        fail(parser.now().line, "too many brackets and blocks inside each other");
      }
    }
    Deeper(const Deeper&) = delete;
    Deeper& operator=(const Deeper&) = delete;
    ~Deeper() { --parser.depth_; }
  };

  const Token& now() const { return tokens_[at_]; }
  Token take() { return at_ + 1 < tokens_.size() ? std::move(tokens_[at_++]) : tokens_[at_]; }
  bool is(Kind kind, std::string_view text) const { return now().kind == kind && now().text == text; }
  bool is_op(std::string_view op) const { return is(Kind::op, op); }
  bool is_word(std::string_view name) const { return is(Kind::name, name); }
  bool took_op(std::string_view op) {
    if (!is_op(op)) return false;
    take();
    return true;
  }
  bool took_word(std::string_view name) {
    if (!is_word(name)) return false;
    take();
    return true;
  }
  Token expect(Kind kind, std::string_view what) {
    if (now().kind != kind) fail(now().line, std::string(what) + " is expected, not " + described(now()));
    return take();
  }
  void expect_op(std::string_view op) {
    if (!took_op(op)) fail(now().line, "'" + std::string(op) + "' is expected, not " + described(now()));
  }

  // Statements up to a tag that begins with one of `ends`, which is left there.
  Block parse_block(std::initializer_list<std::string_view> ends) {
    const Deeper deeper{*this};
    Block block;
    while (now().kind != Kind::end) {
      const std::size_t line = now().line;
      if (now().kind == Kind::data) {
        block.push_back({.does = Does::data, .line = line, .text = take().text});
      } else if (now().kind == Kind::print_begin) {
        take();
        Statement print{.does = Does::print, .line = line};
        print.expressions.push_back(parse_expression());
        expect(Kind::print_end, "'}}'");
        block.push_back(std::move(print));
      } else {
        take();
        if (now().kind != Kind::name) fail(now().line, "a statement is expected, not " + described(now()));
        if (std::find(ends.begin(), ends.end(), now().text) != ends.end()) return block;
        block.push_back(parse_statement());
      }
    }
    if (ends.size() != 0) fail(now().line, "'" + std::string(*(ends.end() - 1)) + "' is missing at the end");
    return block;
  }

  void end_tag() { expect(Kind::block_end, "the end of the tag"); }

  Statement parse_statement() {
    const Token word = take();
    Statement out{.line = word.line};
    if (word.text == "if") {
      parse_if(out);
    } else if (word.text == "for") {
      parse_for(out);
    } else if (word.text == "set") {
      parse_set(out);
    } else if (word.text == "macro") {
      parse_macro(out);
    } else if (word.text == "break" || word.text == "continue") {
      if (loops_ == 0) fail(word.line, "'" + word.text + "' outside of a loop");
      out.does = word.text == "break" ? Does::leave : Does::go_on;
      end_tag();
    } else {
      not_here(word.line, "the statement '" + word.text + "'");
    }
    return out;
  }

  void parse_if(Statement& out) {
    out.does = Does::choose;
    do {
      out.expressions.push_back(parse_or());
      end_tag();
      out.blocks.push_back(parse_block({"elif", "else", "endif"}));
    } while (took_word("elif"));
    if (took_word("else")) {
      end_tag();
      out.blocks.push_back(parse_block({"endif"}));
    }
    take();
    end_tag();
  }

  void parse_for(Statement& out) {
    out.does = Does::loop;
    do {
      out.names.push_back(expect(Kind::name, "a name").text);
      if (out.names.back() == "loop") fail(out.line, "a loop cannot set 'loop'");
    } while (took_op(","));
    if (!took_word("in")) fail(now().line, "'in' is expected, not " + described(now()));
    out.expressions.push_back(parse_or());
    if (is_op(",")) not_here(now().line, "a loop over a list without brackets");
    if (took_word("if")) out.expressions.push_back(parse_expression());
    if (is_word("recursive")) not_here(now().line, "a recursive loop");
    end_tag();
    ++loops_;
    out.blocks.push_back(parse_block({"else", "endfor"}));
    --loops_;
    if (took_word("else")) {
      end_tag();
      out.blocks.push_back(parse_block({"endfor"}));
    }
    take();
    end_tag();
  }

  void parse_set(Statement& out) {
    out.does = Does::assign;
    out.names.push_back(expect(Kind::name, "a name").text);
    if (took_op(".")) {
      out.names.push_back(expect(Kind::name, "a name").text);
      out.to_namespace = true;
    }
    if (is_op(",")) not_here(now().line, "a set of several names");
    if (took_op("=")) {
      out.expressions.push_back(parse_expression());
      if (is_op(",")) not_here(now().line, "a list without brackets");
      end_tag();
      return;
    }
    if (is_op("|")) not_here(now().line, "a set with a filter");
    out.does = Does::capture;
    end_tag();
    out.blocks.push_back(parse_block({"endset"}));
    take();
    end_tag();
  }

  void parse_macro(Statement& out) {
    out.does = Does::define;
    out.text = expect(Kind::name, "a name").text;
    expect_op("(");
    while (!is_op(")")) {
      Parameter parameter{.name = expect(Kind::name, "a name").text, .otherwise = nullptr};
      if (took_op("=")) {
        parameter.otherwise = parse_expression();
      } else if (!out.parameters.empty() && out.parameters.back().otherwise) {
        fail(out.line, "a parameter without a value follows one with a value");
      }
      out.parameters.push_back(std::move(parameter));
      if (!took_op(",")) break;
    }
    expect_op(")");
    end_tag();
    const std::size_t loops = std::exchange(loops_, 0);
    out.blocks.push_back(parse_block({"endmacro"}));
    loops_ = loops;
    take();
    end_tag();
  }

  // Called with every expression that is complete.
  static ExpressionPtr settled(ExpressionPtr e) {
    const auto over = [&](const ExpressionPtr& part) {
      if (part) e->height = std::max(e->height, part->height + 1);
    };
    for (const ExpressionPtr& part : e->parts) over(part);
    for (const Argument& argument : e->arguments) over(argument.value);
    if (e->height > most_height) fail(e->line, "an expression of too many parts inside each other");
    return e;
  }

  static ExpressionPtr make(Form form, std::size_t line, std::string name = {}) {
    auto out = std::make_unique<Expression>();
    out->form = form;
    out->line = line;
    out->name = std::move(name);
    return out;
  }
  static ExpressionPtr make(Form form, std::size_t line, ExpressionPtr part, std::string name = {}) {
    ExpressionPtr out = make(form, line, std::move(name));
    out->parts.push_back(std::move(part));
    return out;
  }

  ExpressionPtr parse_expression() {
    const Deeper deeper{*this};
    ExpressionPtr value = parse_or();
    while (is_word("if")) {
      ExpressionPtr out = make(Form::conditional, take().line);
      out->parts.push_back(parse_or());
      out->parts.push_back(std::move(value));
      if (took_word("else")) out->parts.push_back(parse_expression());
      // Without brackets, one after the other: as deep as there are.
      if (is_word("if")) not_here(now().line, "a condition behind a condition without brackets");
      value = settled(std::move(out));
    }
    return value;
  }

  template <class Next>
  ExpressionPtr parse_joined(Form form, std::string_view word, const Next& next) {
    ExpressionPtr value = next();
    if (!is_word(word)) return value;
    ExpressionPtr out = make(form, now().line, std::move(value));
    while (took_word(word)) out->parts.push_back(next());
    return settled(std::move(out));
  }

  ExpressionPtr parse_or() {
    return parse_joined(Form::any_of, "or", [&] { return parse_and(); });
  }
  ExpressionPtr parse_and() {
    return parse_joined(Form::all_of, "and", [&] { return parse_not(); });
  }
  ExpressionPtr parse_not() {
    const Deeper deeper{*this};
    if (!is_word("not")) return parse_comparison();
    const std::size_t line = take().line;
    return settled(make(Form::negation, line, parse_not()));
  }

  ExpressionPtr parse_comparison() {
    ExpressionPtr value = parse_chain(0);
    ExpressionPtr out;
    while (true) {
      constexpr auto ops = std::to_array<std::string_view>({"==", "!=", ">", ">=", "<", "<="});
      std::string op;
      if (now().kind == Kind::op && std::find(ops.begin(), ops.end(), now().text) != ops.end()) {
        op = take().text;
      } else if (took_word("in")) {
        op = "in";
      } else if (is_word("not") && tokens_[at_ + 1].kind == Kind::name && tokens_[at_ + 1].text == "in") {
        take();
        take();
        op = "not in";
      } else {
        return out ? settled(std::move(out)) : std::move(value);
      }
      if (!out) out = make(Form::comparison, now().line, std::move(value));
      out->ops.push_back(std::move(op));
      out->parts.push_back(parse_chain(0));
    }
  }

  // Operators by rank: + and -, then ~, then * / // %, then **.
  ExpressionPtr parse_chain(std::size_t rank) {
    static const std::array<std::vector<std::string_view>, 4> ranks = {
        {{"+", "-"}, {"~"}, {"*", "/", "//", "%"}, {"**"}}};
    if (rank == ranks.size()) return parse_unary(true);
    ExpressionPtr value = parse_chain(rank + 1);
    ExpressionPtr out;
    while (now().kind == Kind::op &&
           std::find(ranks[rank].begin(), ranks[rank].end(), now().text) != ranks[rank].end()) {
      if (!out) out = make(Form::chain, now().line, std::move(value));
      out->ops.push_back(take().text);
      out->parts.push_back(parse_chain(rank + 1));
    }
    return out ? settled(std::move(out)) : std::move(value);
  }

  ExpressionPtr parse_unary(bool with_filters) {
    const Deeper deeper{*this};
    ExpressionPtr value;
    const std::size_t line = now().line;
    if (took_op("-")) {
      value = make(Form::minus, line, parse_unary(false));
    } else if (took_op("+")) {
      value = make(Form::plus, line, parse_unary(false));
    } else {
      value = parse_primary();
    }
    value = parse_postfix(settled(std::move(value)));
    return with_filters ? parse_filters(std::move(value)) : std::move(value);
  }

  ExpressionPtr parse_primary() {
    const Token token = take();
    switch (token.kind) {
      case Kind::name: {
        const std::string low = token.text == "True"    ? "true"
                                : token.text == "False" ? "false"
                                : token.text == "None"  ? "none"
                                                        : token.text;
        if (low == "true" || low == "false" || low == "none") return make(Form::constant, token.line, low);
        return make(Form::name, token.line, token.text);
      }
      case Kind::text: {
        ExpressionPtr out = make(Form::text, token.line, token.text);
        while (now().kind == Kind::text) out->name += take().text;
        return out;
      }
      case Kind::number:
        return make(Form::number, token.line, token.text);
      case Kind::op:
        if (token.text == "(") return parse_brackets(token.line);
        if (token.text == "[") return parse_items(make(Form::list, token.line), "]");
        if (token.text == "{") return parse_mapping(token.line);
        [[fallthrough]];
      default:
        fail(token.line, "a value is expected, not " + described(token));
    }
  }

  ExpressionPtr parse_items(ExpressionPtr out, std::string_view closing) {
    while (!took_op(closing)) {
      out->parts.push_back(parse_expression());
      if (!is_op(closing)) expect_op(",");
    }
    return out;
  }

  ExpressionPtr parse_brackets(std::size_t line) {
    if (took_op(")")) return make(Form::tuple, line);
    ExpressionPtr value = parse_expression();
    if (took_op(")")) return value;
    expect_op(",");
    return parse_items(make(Form::tuple, line, std::move(value)), ")");
  }

  ExpressionPtr parse_mapping(std::size_t line) {
    ExpressionPtr out = make(Form::mapping, line);
    while (!took_op("}")) {
      out->parts.push_back(parse_expression());
      expect_op(":");
      out->parts.push_back(parse_expression());
      if (!is_op("}")) expect_op(",");
    }
    return out;
  }

  ExpressionPtr parse_postfix(ExpressionPtr value) {
    while (now().kind == Kind::op) {
      const std::size_t line = now().line;
      if (took_op(".")) {
        if (now().kind == Kind::number) {
          ExpressionPtr index = make(Form::number, line, take().text);
          value = make(Form::item, line, std::move(value));
          value->parts.push_back(std::move(index));
        } else {
          std::string name = expect(Kind::name, "a name").text;
          value = make(Form::attribute, line, std::move(value), std::move(name));
        }
      } else if (took_op("[")) {
        value = parse_subscript(std::move(value), line);
      } else if (is_op("(")) {
        value = make(Form::call, line, std::move(value));
        value->arguments = parse_arguments();
      } else {
        break;
      }
      value = settled(std::move(value));
    }
    return value;
  }

  ExpressionPtr parse_subscript(ExpressionPtr value, std::size_t line) {
    ExpressionPtr out = make(Form::item, line, std::move(value));
    if (!is_op(":")) out->parts.push_back(parse_expression());
    if (is_op(":")) {
      out->form = Form::slice;
      out->parts.resize(4);
      for (std::size_t part = 2; part < 4 && took_op(":"); ++part) {
        if (!is_op(":") && !is_op("]")) out->parts[part] = parse_expression();
      }
    }
    if (is_op(",")) not_here(line, "a subscript of several values");
    expect_op("]");
    return out;
  }

  std::vector<Argument> parse_arguments() {
    std::vector<Argument> out;
    expect_op("(");
    while (!took_op(")")) {
      if (is_op("*") || is_op("**")) not_here(now().line, "an argument list in a variable");
      Argument argument;
      if (now().kind == Kind::name && tokens_[at_ + 1].kind == Kind::op && tokens_[at_ + 1].text == "=") {
        argument.name = take().text;
        take();
      } else if (!out.empty() && !out.back().name.empty()) {
        fail(now().line, "an argument without a name follows one with a name");
      }
      argument.value = parse_expression();
      out.push_back(std::move(argument));
      if (!is_op(")")) expect_op(",");
    }
    return out;
  }

  ExpressionPtr parse_filters(ExpressionPtr value) {
    while (true) {
      const std::size_t line = now().line;
      if (took_op("|")) {
        std::string name = expect(Kind::name, "the name of a filter").text;
        value = make(Form::filter, line, std::move(value), std::move(name));
        if (is_op("(")) value->arguments = parse_arguments();
      } else if (is_word("is")) {
        value = parse_test(std::move(value));
      } else if (is_op("(")) {
        value = make(Form::call, line, std::move(value));
        value->arguments = parse_arguments();
      } else {
        return value;
      }
      value = settled(std::move(value));
    }
  }

  ExpressionPtr parse_test(ExpressionPtr value) {
    const std::size_t line = take().line;
    const bool is_negated = took_word("not");
    std::string name = expect(Kind::name, "the name of a test").text;
    ExpressionPtr out = make(Form::test, line, std::move(value), std::move(name));
    const bool is_bare = now().kind == Kind::text || now().kind == Kind::number || is_op("[") || is_op("{") ||
                         (now().kind == Kind::name && !is_word("else") && !is_word("or") && !is_word("and"));
    if (is_op("(")) {
      out->arguments = parse_arguments();
    } else if (is_bare) {
      if (is_word("is")) fail(now().line, "a test behind a test");
      Argument argument;
      argument.value = parse_postfix(parse_primary());
      out->arguments.push_back(std::move(argument));
    }
    return is_negated ? make(Form::negation, line, std::move(out)) : std::move(out);
  }

  std::vector<Token> tokens_;
  std::size_t at_ = 0;
  std::size_t depth_ = 0;
  std::size_t loops_ = 0;  // around the statement that is being read
};

}  // namespace

void fail(std::size_t line, const std::string& problem) {
  throw Error("the model's chat template, line " + std::to_string(line) + ": " + problem);
}

void not_here(std::size_t line, const std::string& what) {
  fail(line, what + " is not supported here; lay the prompt out by hand as raw text");
}

Block parse(std::string_view source) { return Parser{source}.program(); }

}  // namespace engine::jinja
