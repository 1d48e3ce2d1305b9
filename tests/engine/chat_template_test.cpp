#include "engine/chat_template.hpp"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "engine/error.hpp"
#include "recorded_cases.hpp"

namespace engine {
namespace {

constexpr std::string_view chatml =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

// Each template as Jinja2 renders it; where Jinja2 refuses a conversation, the engine must as well.
TEST(ChatTemplateReference, RendersAsJinjaDoes) {
  std::size_t rendered = 0;
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
      } else {
        EXPECT_EQ(chat.render(messages, generation), expected.at("rendered").get<std::string>()) << where;
        ++rendered;
      }
    }
  }
  EXPECT_GE(rendered, 150U);
}

TEST(ChatTemplate, SmolLmPutsItsDefaultSystemMessageFirst) {
  const auto entry = recorded::cases("chat_templates.json").at(0);
  ASSERT_EQ(entry.at("name"), "smollm2");
  const ChatTemplate chat(entry.at("template").get<std::string>(), entry.at("bos"), entry.at("eos"));
  EXPECT_EQ(chat.family(), ChatFamily::chatml);
  EXPECT_EQ(chat.default_system(), "You are a helpful AI assistant named SmolLM, trained by Hugging Face");
  const std::vector<ChatMessage> question{{.role = "user", .content = "Hi"}};
  EXPECT_EQ(
      chat.render(question),
      "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
      "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
}

TEST(ChatTemplate, NamesItsFamily) {
  const std::vector<std::pair<std::string, ChatFamily>> expected{{"chatml", ChatFamily::chatml},
                                                                 {"llama2", ChatFamily::llama2},
                                                                 {"llama3", ChatFamily::llama3},
                                                                 {"zephyr", ChatFamily::zephyr},
                                                                 {"mistral", ChatFamily::mistral}};
  for (const auto& entry : recorded::cases("chat_templates.json")) {
    const ChatTemplate chat(entry.at("template").get<std::string>(), "<s>", "</s>");
    const std::string recorded_name = entry.at("name");
    for (const auto& [prefix, family] : expected) {
      if (recorded_name.starts_with(prefix)) {
        EXPECT_EQ(chat.family(), family) << recorded_name;
        EXPECT_EQ(name(chat.family()), prefix);
      }
    }
  }
}

TEST(ChatTemplate, RefusesATemplateOfNoKnownFamilyAndNamesThoseItKnows) {
  const auto make = [](std::string_view jinja) { ChatTemplate chat(jinja, "<s>", "</s>"); };
  expect_error([&] { make("{{ messages[0].content }}"); }, "chatml, llama2, llama3, zephyr and mistral");
  expect_error([&] { make("{{ messages[0].content }}"); }, "begins: {{ messages[0].content }}");
  expect_error([&] { make(""); }, "no chat template");
  // Formats that share markers with a known family, but not the layout.
  expect_error(
      [&] {
        make("{{'<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>'}}");
      },
      "no known family");
  expect_error(
      [&] { make("{{'<|user|>\n' + message['content'] + '<|end|>\n<|assistant|>\n'}}{{ eos_token }}"); },
      "no known family");
}

TEST(ChatTemplate, RefusesConversationsItCannotLayOut) {
  const ChatTemplate chat(chatml, "<s>", "</s>");
  expect_error([&] { chat.render({}); }, "no messages");
  const std::vector<ChatMessage> tool{{.role = "user", .content = "a"}, {.role = "tool", .content = "b"}};
  expect_error([&] { chat.render(tool); }, "message 1 has the role 'tool'");
}

TEST(ChatTemplate, BrokenJinjaIsReadToItsEnd) {
  const std::vector<ChatMessage> question{{.role = "user", .content = "Hi"}};
  for (const std::string_view markers :
       {"<|im_start|><|im_end|>", "[INST][/INST]", "<|user|><|assistant|>eos_token"}) {
    for (const std::string_view ending :
         {"{{", "{{ '", "{{ \"a\\", "{%", "{#", "{", "{{ 'a", "{# }", "{{ eos_token", "{{ eos_token +",
          "{{ ' ' +", "{{ '<|assistant|>'", "{{ eos_token }}"}) {
      const std::string text = std::string(markers).append(ending);
      EXPECT_NO_THROW(ChatTemplate(text, "", "").render(question)) << text;
    }
  }
}

TEST(ChatTemplate, AHugeTemplateIsNoTrouble) {
  const std::vector<ChatMessage> question{{.role = "user", .content = "Hi"}};
  const std::string filling(4 << 20, ' ');
  const std::string dates =
      "<|start_header_id|><|eot_id|>Cutting Knowledge Date{% set date_string" + filling + "= \"";
  const std::string letters(1 << 20, 'x');
  EXPECT_EQ(ChatTemplate(dates + letters + "\" %}", "", "").default_system(),
            "Cutting Knowledge Date: December 2023\nToday Date: " + letters + "\n\n");
  EXPECT_NO_THROW(ChatTemplate("[INST][/INST]{{ eos_token" + filling, "", "").render(question));
  expect_error([&] { ChatTemplate("<|start_header_id|><|eot_id|>Cutting Knowledge Date", "", ""); },
               "sets no date_string");
}

}  // namespace
}  // namespace engine
