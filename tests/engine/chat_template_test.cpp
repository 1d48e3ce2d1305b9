#include "engine/chat_template.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "engine/error.hpp"
#include "recorded_cases.hpp"

namespace engine {
namespace {

const std::vector<ChatMessage> question{{.role = "user", .content = "Hi"}};

// Each template as Jinja2 renders it; where Jinja2 refuses a conversation, the engine must as well.
TEST(ChatTemplateReference, RendersAsJinjaDoes) {
  std::size_t rendered = 0;
  std::size_t refused = 0;
  for (const auto& entry : recorded::cases("chat_templates.json")) {
    const ChatTemplate chat(entry.at("template").get<std::string>(), entry.at("bos"), entry.at("eos"));
    for (const auto& expected : entry.at("cases")) {
      std::vector<ChatMessage> messages;
      for (const auto& message : expected.at("messages")) {
        messages.push_back({.role = message.at("role"), .content = message.at("content")});
      }
      const bool generation = expected.at("add_generation_prompt");
      const std::string where = entry.at("name").get<std::string>() + ": " + expected.at("messages").dump();
      if (expected.at("rendered").is_null()) {
        EXPECT_THROW(chat.render(messages, generation), Error) << where;
        ++refused;
      } else {
        EXPECT_EQ(chat.render(messages, generation), expected.at("rendered").get<std::string>()) << where;
        ++rendered;
      }
    }
  }
  EXPECT_GE(rendered, 800U);
  EXPECT_GE(refused, 50U);
}

TEST(ChatTemplate, SmolLmPutsItsDefaultSystemMessageFirst) {
  const auto entry = recorded::cases("chat_templates.json").at(0);
  ASSERT_EQ(entry.at("name"), "smollm2");
  const ChatTemplate chat(entry.at("template").get<std::string>(), entry.at("bos"), entry.at("eos"));
  EXPECT_EQ(chat.family(), ChatFamily::chatml);
  EXPECT_EQ(
      chat.render(question),
      "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
      "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
}

TEST(ChatTemplate, NamesItsFamily) {
  const std::map<std::string, ChatFamily> expected{
      {"chatml", ChatFamily::chatml}, {"llama2", ChatFamily::llama2},         {"llama3", ChatFamily::llama3},
      {"zephyr", ChatFamily::zephyr}, {"mistral_first", ChatFamily::mistral}, {"gemma", ChatFamily::other},
      {"phi4", ChatFamily::other}};
  std::size_t seen = 0;
  for (const auto& entry : recorded::cases("chat_templates.json")) {
    const auto found = expected.find(entry.at("name").get<std::string>());
    if (found == expected.end()) continue;
    const ChatTemplate chat(entry.at("template").get<std::string>(), "<s>", "</s>");
    EXPECT_EQ(chat.family(), found->second) << found->first;
    ++seen;
  }
  EXPECT_EQ(seen, expected.size());
  EXPECT_EQ(name(ChatFamily::chatml), "chatml");
  EXPECT_EQ(name(ChatFamily::other), "other");
}

TEST(ChatTemplate, RefusesConversationsItCannotLayOut) {
  expect_error([] { ChatTemplate("", "", ""); }, "no chat template");
  const ChatTemplate chat("{% for m in messages %}{{ m.content }}{% endfor %}", "<s>", "</s>");
  expect_error([&] { chat.render({}); }, "no messages");
  const std::vector<ChatMessage> tool{{.role = "user", .content = "a"}, {.role = "tool", .content = "b"}};
  expect_error([&] { chat.render(tool); }, "message 1 has the role 'tool'");
  expect_error(
      [] { ChatTemplate("{{ raise_exception('Not ' ~ messages[0].role) }}", "", "").render(question); },
      "refuses the messages: Not user");
}

// Markers of the template and texts of the messages stay apart, whatever a template does to a message.
TEST(ChatTemplate, KnowsWhatComesFromTheMessages) {
  const std::vector<ChatMessage> messages{{.role = "user", .content = "  a b<|im_end|> "}};
  const auto outside = [&](const std::string& expression) {
    const PromptText laid_out = ChatTemplate("[{{ " + expression + " }}]", "<s>", "</s>").lay_out(messages);
    std::string shown;
    for (std::size_t at = 0; at < laid_out.size(); ++at) {
      shown.push_back(laid_out.is_outside(at) ? laid_out.text()[at] : '.');
    }
    return shown;
  };
  const std::string message = "messages[0].content";
  EXPECT_EQ(outside(message), ".  a b<|im_end|> .");
  EXPECT_EQ(outside(message + "|trim"), ".a b<|im_end|>.");
  EXPECT_EQ(outside(message + ".strip('>< ')"), ".a b<|im_end|.");
  EXPECT_EQ(outside("'<|im_start|>' + messages[0].role + '\n' ~ " + message + "|trim + eos_token"),
            "..................a b<|im_end|>.....");
  EXPECT_EQ(outside(message + "|replace('<|im_end|>', '</s>')"), ".  a b.... .");
  EXPECT_EQ(outside(message + ".split()|join('--')"), ".a..b<|im_end|>.");
  EXPECT_EQ(outside(message + "[2:5]|upper"), ".A B.");
  EXPECT_EQ(outside(message + "[::-1][1]"), ".>.");
  EXPECT_EQ(outside("(" + message + " * 2)|length"), "....");
  EXPECT_EQ(outside("messages|map(attribute='content')|map('trim')|first|title"), ".A B<|im_end|>.");
}

struct Refused {
  std::string_view name;
  std::string_view jinja;
  std::string_view message;
};

const Refused refused_templates[] = {
    {"statement", "a\n{% generation %}", "line 2: the statement 'generation'"},
    {"include", "{% include 'x' %}", "'include'"},
    {"raw", "{% raw %}{{ }}{% endraw %}", "'raw'"},
    {"filter_block", "{% filter upper %}x{% endfilter %}", "'filter'"},
    {"call", "{% call x() %}x{% endcall %}", "'call'"},
    {"with", "{% with a = 1 %}{% endwith %}", "'with'"},
    {"no_statement", "{% %}", "a statement is expected"},
    {"stray_end", "{% endif %}", "'endif'"},
    {"no_endif", "{% if true %}\n\nx", "line 3: 'endif' is missing"},
    {"no_endfor", "{% for m in messages %}", "'endfor' is missing"},
    {"open_print", "x\n{{ messages", "line 2: a tag has no end: '}}'"},
    {"open_block", "{% if x", "'%}' is missing"},
    {"open_comment", "{# x", "'#}' is missing"},
    {"open_text", "{{ 'a }}", "closing quote"},
    {"open_text_after_backslash", "{{ \"a\\", "closing quote"},
    {"nothing_printed", "{{ }}", "a value is expected, not the end of the tag"},
    {"brackets", "{{ (1 }}", "'}' closes nothing"},
    {"character", "{{ a ? b }}", "'?' is not expected"},
    {"unicode_name", "{{ \xC3\xA9 }}", "'\xC3\xA9' is not expected"},
    {"fraction", "{{ 1.5 }}", "a floating-point number"},
    {"division", "{{ 3 / 2 }}", "'/' between numbers"},
    {"division_by_zero", "{{ 3 // 0 }}", "zero"},
    {"large_number", "{{ 999999999999999999 * 99 }}", "64 bits"},
    {"tojson", "{{ messages[0] | tojson }}", "the filter 'tojson'"},
    {"unknown_filter", "{{ 'a' | frobnicate }}", "the filter 'frobnicate'"},
    {"safe", "{{ 'a' | safe }}", "the filter 'safe'"},
    {"unknown_test", "{{ 'a' is frobnicated }}", "the test 'frobnicated'"},
    {"method", "{{ 'a'.rjust(3) }}", "the method 'rjust'"},
    {"format", "{{ '{}'.format(1) }}", "the method 'format'"},
    {"append", "{{ messages.append(1) }}", "'append' of a list"},
    {"today", "{{ strftime_now('%Y') }}", "'strftime_now' is undefined"},
    {"undefined", "{{ nobody.name }}", "'nobody' is undefined"},
    {"undefined_sum", "{{ 'a' + nobody }}", "'nobody' is undefined"},
    {"joining_none", "{{ 'a' + none }}", "'+' between a text and none"},
    {"print_list", "{{ messages }}", "writing a list"},
    {"print_mapping", "{{ messages[0] }}", "writing a mapping"},
    {"private", "{{ messages.__class__ }}", "'__class__'"},
    {"letters", "{{ '\xC3\xA9' | upper }}", "'upper' of letters beyond a to z"},
    {"twice", "{% set s = messages | map(attribute='role') %}{{ s | list | length }}{{ s | join }}",
     "going twice"},
    {"recursive", "{% for m in messages recursive %}{% endfor %}", "a recursive loop"},
    {"break_outside", "{% break %}", "outside of a loop"},
    {"macro_arguments", "{% macro m(a) %}{% endmacro %}{{ m(1, 2) }}", "too many arguments"},
    {"caller", "{% macro m() %}{{ caller() }}{% endmacro %}{{ m() }}", "'caller'"},
    {"escape", "{{ '\\N{BULLET}' }}", "the escape '\\N'"},
    {"loop_of_number", "{% for x in 3 %}{% endfor %}", "a number cannot be gone over"},
    {"endless_macro", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "too deep"},
    {"endless_loops", "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
     "steps"},
    {"endless_text",
     "{% set n = namespace(t='xxxxxxxx') %}{% for i in range(99) %}{% set n.t = n.t + n.t %}{% endfor %}",
     "too much text"},
    {"endless_list",
     "{% set n = namespace(t=[]) %}{% for i in range(9999) %}{% set n.t = [n.t] %}{% endfor %}", "a list"},
    {"namespace_in_itself", "{% set n = namespace() %}{% set n.t = [n] %}", "a namespace into a list"},
};

TEST(Jinja, RefusesWhatItDoesNotKnowByName) {
  for (const Refused& refused : refused_templates) {
    SCOPED_TRACE(refused.name);
    expect_error([&] { ChatTemplate(refused.jinja, "<s>", "</s>").render(question); },
                 std::string(refused.message));
  }
}

TEST(Jinja, BracketsAndBlocksInsideEachOtherHaveABound) {
  const auto render = [](const std::string& before, const std::string& inside, const std::string& after) {
    for (const std::size_t depth : {10UL, 1000UL, 100'000UL}) {
      std::string text;
      for (std::size_t i = 0; i < depth; ++i) text += before;
      text += inside;
      for (std::size_t i = 0; i < depth; ++i) text += after;
      if (depth == 10) {
        EXPECT_NO_THROW(ChatTemplate(text, "", "").render(question)) << text;
      } else {
        EXPECT_THROW(ChatTemplate(text, "", "").render(question), Error) << before << depth;
      }
    }
  };
  render("{% if true %}", "x", "{% endif %}");
  for (const char* before : {"(", "[", "not ", "-", "{'a': ", "'x' if 1 else ", "'a' ~ ("}) {
    const std::string open(before);
    const bool has_list = open == "[" || open.starts_with('{');
    const std::string close = open == "(" || open.ends_with('(') ? ")"
                              : open == "["                      ? "]"
                              : open.starts_with('{')            ? "}"
                                                                 : "";
    for (const std::size_t depth : {10UL, 100'000UL}) {
      std::string text = "{{ ";
      for (std::size_t i = 0; i < depth; ++i) text += open;
      text += "1";
      for (std::size_t i = 0; i < depth; ++i) text += close;
      text += has_list ? " | length }}" : " }}";
      if (depth == 10) {
        EXPECT_NO_THROW(ChatTemplate(text, "", "").render(question)) << text;
      } else {
        EXPECT_THROW(ChatTemplate(text, "", "").render(question), Error) << open;
      }
    }
  }
  std::string links = "{{ messages[0].content";
  for (int i = 0; i < 100'000; ++i) links += ".strip()";
  EXPECT_THROW(ChatTemplate(links + " }}", "", ""), Error);
  // What stands side by side has none.
  std::string sum = "{{ 'a'";
  for (int i = 0; i < 20'000; ++i) sum += i % 2 == 0 ? " ~ 'b'" : " 'c'";
  EXPECT_EQ(ChatTemplate(sum + " }}", "", "").render(question).size(), 20'001U);
}

TEST(Jinja, AHugeTemplateIsNoTrouble) {
  const std::string filling(4 << 20, ' ');
  EXPECT_EQ(ChatTemplate("{% if" + filling + "true %}a{% endif %}" + filling + "{{- 'b' }}", "", "")
                .render(question),
            "ab");
  const std::string letters(1 << 20, 'x');
  EXPECT_EQ(ChatTemplate("{{ '" + letters + "' }}{# " + letters + " #}", "", "").render(question), letters);
  EXPECT_EQ(ChatTemplate("{ " + std::string(1 << 20, '#') + " {", "", "").family(), ChatFamily::other);
}

// Sixteen times the template takes about sixteen times as long; a square would take 256 times.
TEST(Jinja, TimeGrowsWithTheTemplate) {
  const auto seconds = [](std::size_t count) {
    std::string text;
    for (std::size_t i = 0; i < count; ++i) {
      text += "{% if messages[0].role == 'system' %}a{% elif x is defined %}b{% endif %}\n{{- 'c' ~ i }} { ";
    }
    double best = 1e9;
    for (int round = 0; round < 3; ++round) {
      const auto begin = std::chrono::steady_clock::now();
      EXPECT_EQ(ChatTemplate(text, "", "").render(question).size(), 4 * count);
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
      best = std::min(best, took.count());
    }
    return best;
  };
  const double few = seconds(1'000);
  EXPECT_LT(seconds(16'000), 80 * few);
}

// What other programs' users reported: either what Jinja gives, or an error.
TEST(ChatTemplate, LaysOutReportedTemplates) {
  const std::filesystem::path path =
      std::filesystem::path(COMPRESSKV_SHARED_DIR) / ".." / "reported" / "chat_templates.json";
  std::ifstream stream(path);
  if (!stream) GTEST_SKIP() << path << " is not there";
  const auto recorded = nlohmann::json::parse(stream);
  const std::map<std::string, std::string> expected{
      {"chatml_var_default",
       "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhi <|im_end|>\n"
       "<|im_start|>assistant\n"},
      {"chatml_parts_default",
       "<|im_start|>system\nYou are a careful assistant.<|im_end|>\n<|im_start|>user\nhi <|im_end|>\n"
       "<|im_start|>assistant\n"},
      {"chatml_trim", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"},
      {"chatml_think", "<|im_start|>user\nhi <|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"},
      {"chatml_noline", "<|im_start|>user\nhi <|im_end|><|im_start|>assistant\n"},
      {"chatml_roles", "<|im_start|>human\nhi <|im_end|>\n<|im_start|>gpt\n"},
      {"chatml_crlf", "<|im_start|>user\nhi <|im_end|>\n<|im_start|>assistant\n"},
      {"chatml_plain", "<|im_start|>user\nhi <|im_end|>\n<|im_start|>assistant\n"},
      {"chatml_always", "<|im_start|>user\nhi <|im_end|>\n<|im_start|>assistant\n"}};
  const std::vector<ChatMessage> message{{.role = "user", .content = "hi "}};
  for (const auto& [name, text] : expected) {
    EXPECT_EQ(ChatTemplate(recorded.at(name).get<std::string>(), "<s>", "</s>").render(message), text)
        << name;
  }
}

}  // namespace
}  // namespace engine
