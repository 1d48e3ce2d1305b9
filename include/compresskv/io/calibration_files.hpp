#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "compresskv/core/error.hpp"
#include "compresskv/core/head_ranking.hpp"
#include "compresskv/core/head_scores.hpp"
#include "compresskv/core/layer_errors.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/io/json_file.hpp"
#include "compresskv/io/query_statistics_file.hpp"
#include "compresskv/io/surrogate_file.hpp"

/// Calibration files in the formats that were published with CompressKV (arXiv 2508.02401, 2606.24467), so
/// that its files load here and ours load there. All are JSON text; query statistics, which were not, have a
/// form of their own (query_statistics_file.hpp):
///
/// | what | form |
/// | --- | --- |
/// | head ranking | `{"<layer>": [query heads, best first], ...}` |
/// | head scores | `{"<layer>-<head>": [score per counted run, ...], ...}` |
/// | layer errors | `{"<data set>": [error per layer], ..., "avg_score": [error per layer]}` |
///
/// Files are checked whole while they are read: whatever is wrong is a FileError that names the file, the
/// place, the value and what to do. Files are written whole or not at all.
namespace compresskv::io {

namespace detail {

using Json = nlohmann::json;

/// Runs `make`; what the core types reject becomes an error of `file`.
template <class Make>
auto checked(const std::filesystem::path& file, const Make& make) {
  try {
    return make();
  } catch (const ArgumentError& error) {
    const std::string said = quoted(error.what());  // it may hold a name of the file's
    fail(file, said.substr(1, said.size() - 2));
  }
}

/// Messages of the core types show the whole name of a data set.
inline void require_short_name(const std::filesystem::path& file, const std::string& name) {
  constexpr std::size_t most = 256;
  require(name.size() <= most, file, "the name of data set ", shown_text(name), " is too long: at most ",
          most, " bytes");
}

/// A JSON object and its keys in the order of the file: a sorted object finds keys fast in files of any size,
/// but forgets their order.
struct ParsedObject {
  Json object;
  std::vector<std::string> keys;
};

/// Parses `text`, which must be one JSON object, not empty. `line` is the file's line it stands on, 0 where
/// it is the whole file.
inline ParsedObject parse_object(const std::filesystem::path& file, std::string_view text,
                                 std::size_t line = 0) {
  ParsedObject parsed;
  const std::string where = line > 0 ? " in line " + std::to_string(line) + " of the file" : "";
  const auto refuse = [&](const std::string& reason) { fail(file, reason); };
  parsed.object = parse_json<Json>(text, where, refuse, &parsed.keys);
  require(parsed.object.is_object(), file, "holds ", shown(parsed.object), where,
          ", not an object: give a file made by calibration");
  require(!parsed.object.empty(), file, "holds an empty object", where, ": make the calibration again");
  return parsed;
}

/// A number without sign, blanks or leading zeros, as the formats' keys are written.
inline std::optional<std::uint32_t> parse_id(std::string_view text) {
  std::uint32_t id = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), id);
  const bool whole = error == std::errc{} && end == text.data() + text.size();
  return whole && (text.size() == 1 || text.front() != '0') ? std::optional(id) : std::nullopt;
}

struct HeadKey {
  std::uint32_t layer;
  std::uint32_t head;
};

inline std::optional<HeadKey> parse_head_key(std::string_view key) {
  const auto dash = key.find('-');
  if (dash == std::string_view::npos) {
    return std::nullopt;
  }
  const auto layer = parse_id(key.substr(0, dash));
  const auto head = parse_id(key.substr(dash + 1));
  return layer && head ? std::optional(HeadKey{*layer, *head}) : std::nullopt;
}

inline bool looks_like_ranking(const ParsedObject& parsed) {
  return std::all_of(parsed.keys.begin(), parsed.keys.end(),
                     [](const std::string& key) { return parse_id(key).has_value(); });
}

inline bool looks_like_scores(const ParsedObject& parsed) {
  return std::all_of(parsed.keys.begin(), parsed.keys.end(),
                     [](const std::string& key) { return parse_head_key(key).has_value(); });
}

/// The list under `owner`, e.g. "layer 3"; neither absent nor empty.
inline const Json& list_of(const std::filesystem::path& file, const std::string& owner, const Json& value,
                           std::string_view what) {
  require(value.is_array(), file, owner, " holds ", shown(value), ", not a list of ", what,
          ": make the file again");
  require(!value.empty(), file, owner, " has an empty list: give at least one of its ", what);
  return value;
}

inline std::vector<double> numbers_of(const std::filesystem::path& file, const std::string& owner,
                                      const Json& value, std::string_view what) {
  std::vector<double> numbers;
  for (const Json& element : list_of(file, owner, value, what)) {
    if (!element.is_number()) {
      fail(file, owner, " has ", shown(element), " at place ", numbers.size(), " of its ", what,
           ": every one must be a finite number");
    }
    numbers.push_back(element.get<double>());
  }
  return numbers;
}

inline HeadRanking ranking_of(const std::filesystem::path& file, const ParsedObject& parsed) {
  std::vector<std::vector<std::uint32_t>> layers(parsed.keys.size());
  for (const std::string& key : parsed.keys) {
    if (!parse_id(key)) {
      fail(file, "key ", shown_text(key), " is not a layer number",
           parsed.object.contains("avg_score")
               ? "; these are layer errors: give the head ranking"
               : ": a head ranking is {\"<layer>\": [heads], ...}, layers from 0");
    }
  }
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    const std::string key = std::to_string(layer);
    const auto found = parsed.object.find(key);
    require(found != parsed.object.end(), file, "layer \"", key, "\" is absent, though the file has ",
            layers.size(), " layers: they must be numbered from 0 without gaps");
    const std::string owner = "layer " + key;
    std::unordered_map<std::uint32_t, std::size_t> places;
    for (const Json& element : list_of(file, owner, *found, "heads")) {
      if (!element.is_number_unsigned() ||
          element.get<std::uint64_t>() > (std::numeric_limits<std::uint32_t>::max)()) {
        fail(file, owner, " lists head ", shown(element), " at place ", layers[layer].size(),
             ": heads are whole numbers from 0 to the model's last head");
      }
      const auto head = element.get<std::uint32_t>();
      const auto [first, fresh] = places.emplace(head, layers[layer].size());
      require(fresh, file, owner, " lists head ", head, " twice, at places ", first->second, " and ",
              layers[layer].size(), ": each head may stand once");
      layers[layer].push_back(head);
    }
  }
  return checked(file, [&] { return HeadRanking(std::move(layers)); });
}

inline HeadScores scores_of(const std::filesystem::path& file, const ParsedObject& parsed) {
  std::size_t layers = 0;
  std::size_t heads = 0;
  for (const std::string& key : parsed.keys) {
    const auto id = parse_head_key(key);
    require(id.has_value(), file, "key ", shown_text(key),
            " is not of the form \"<layer>-<head>\": head scores are {\"<layer>-<head>\": [scores], ...}, "
            "both numbered from 0");
    layers = (std::max<std::size_t>)(layers, std::size_t{id->layer} + 1);
    heads = (std::max<std::size_t>)(heads, std::size_t{id->head} + 1);
  }
  // The loops end at the first gap, so that a wild number in a key costs no more than the file is long.
  std::vector<std::vector<double>> runs;
  runs.reserve(parsed.keys.size());
  for (std::size_t layer = 0; layer < layers; ++layer) {
    for (std::size_t head = 0; head < heads; ++head) {
      const auto found = parsed.object.find(std::to_string(layer) + "-" + std::to_string(head));
      const std::string owner = "layer " + std::to_string(layer) + " head " + std::to_string(head);
      require(found != parsed.object.end(), file, "scores of ", owner,
              " are absent, though the file goes up to layer ", layers - 1, " and head ", heads - 1,
              ": every head of every layer must have its scores");
      runs.push_back(numbers_of(file, owner, *found, "scores"));
      require(runs.back().size() == runs.front().size(), file, owner, " has ", runs.back().size(),
              " scores, layer 0 head 0 has ", runs.front().size(),
              ": every head has one score per counted run");
    }
  }
  return checked(file, [&] { return HeadScores(layers, heads, std::move(runs)); });
}

/// The JSON objects of a layer error file: one, or one a line.
inline std::vector<ParsedObject> error_objects(const std::filesystem::path& file, const std::string& text) {
  std::vector<std::pair<std::size_t, std::string_view>> lines;
  const std::string_view all = text;
  for (std::size_t begin = 0, number = 1; begin < all.size(); ++number) {
    const std::size_t end = (std::min)(all.find('\n', begin), all.size());
    const std::string_view line = all.substr(begin, end - begin);
    if (line.find_first_not_of(" \t\r") != std::string_view::npos) {
      lines.emplace_back(number, line);
    }
    begin = end + 1;
  }
  // Where the first line is no whole value it is the head of an indented object.
  if (lines.size() == 1 || !Json::accept(lines.front().second)) {
    lines = {{0, all}};
  }
  std::vector<ParsedObject> objects;
  objects.reserve(lines.size());
  for (const auto& [number, line] : lines) {
    objects.push_back(parse_object(file, line, number));
  }
  return objects;
}

/// The text of an object, built key by key so that its lines can be chosen.
class ObjectText {
 public:
  enum class Lines { one, one_a_key };

  explicit ObjectText(Lines lines) : lines_(lines) {}

  void add(const std::string& key, const Json& list) {
    if (!text_.empty()) {
      text_ += lines_ == Lines::one ? ", " : ",\n";
    }
    text_ += Json(key).dump() + ": " + list.dump();
  }

  std::string whole() const { return lines_ == Lines::one ? "{" + text_ + "}\n" : "{\n" + text_ + "\n}\n"; }

 private:
  Lines lines_;
  std::string text_;
};

}  // namespace detail

/// Reads a head ranking, or raw head scores, whose ranking it then derives (`HeadScores::ranking`).
/// Throws FileError when the file is absent, no JSON, has a layer missing or too many, a key or a head twice,
/// or a head that is no whole number from 0. Whether it fits the model is checked by the plan that uses it.
inline HeadRanking load_head_ranking(const std::filesystem::path& file) {
  const auto parsed = detail::parse_object(file, detail::read_text(file));
  return detail::looks_like_scores(parsed) ? detail::scores_of(file, parsed).ranking()
                                           : detail::ranking_of(file, parsed);
}

/// The same for the model that will use it. Throws FileError also when the file has another number of layers
/// or names a head that the model does not have: it was calibrated for another model.
inline HeadRanking load_head_ranking(const std::filesystem::path& file, const ModelShape& shape) {
  HeadRanking ranking = load_head_ranking(file);
  detail::checked(file, [&] { ranking.validate(shape.layers, shape.query_heads); });
  return ranking;
}

/// Reads raw head scores, one number per counted calibration run.
/// Throws FileError as `load_head_ranking`, and when heads have differing numbers of scores, a score is not a
/// finite number, or the file is a ranking, which has no scores.
inline HeadScores load_head_scores(const std::filesystem::path& file) {
  const auto parsed = detail::parse_object(file, detail::read_text(file));
  detail::require(!detail::looks_like_ranking(parsed), file,
                  "is a head ranking, which has no scores: give the file of raw scores it was made from, or "
                  "calibrate the model again");
  return detail::scores_of(file, parsed);
}

/// The same for the model that will use them; throws FileError as `load_head_ranking` does.
inline HeadScores load_head_scores(const std::filesystem::path& file, const ModelShape& shape) {
  HeadScores scores = load_head_scores(file);
  detail::checked(file, [&] { scores.validate(shape.layers, shape.query_heads); });
  return scores;
}

/// Reads layer errors: one object with `avg_score`, or one object a data set a line without it, as a
/// measurement writes them at first; the mean is then computed. Everything is normalised to sum 1 again.
/// Throws FileError when the file is absent, no JSON, a data set stands twice or has another number of
/// layers, or an error is negative or not a finite number, or all of a data set's are 0.
inline LayerErrors load_layer_errors(const std::filesystem::path& file) {
  const std::vector<detail::ParsedObject> objects = detail::error_objects(file, detail::read_text(file));
  std::vector<LayerErrors::DataSet> data_sets;
  std::optional<std::vector<double>> average;
  std::set<std::string> names;
  for (const detail::ParsedObject& parsed : objects) {
    detail::require(
        !(detail::looks_like_ranking(parsed) || detail::looks_like_scores(parsed)), file, "key ",
        detail::shown_text(parsed.keys.front()),
        " is a layer's or a head's, so this is a head ranking or head scores: give the layer errors");
    for (const std::string& name : parsed.keys) {
      detail::require(names.insert(name).second, file, "data set ", detail::shown_text(name),
                      " stands on two lines: remove one of the two");
      detail::require_short_name(file, name);
      auto errors = detail::numbers_of(file, "data set " + detail::shown_text(name), parsed.object.at(name),
                                       "layer errors");
      if (name == "avg_score") {
        average = std::move(errors);
      } else {
        data_sets.push_back({.name = name, .errors = std::move(errors)});
      }
    }
  }
  return detail::checked(file, [&] {
    return average ? LayerErrors(std::move(*average), std::move(data_sets))
                   : LayerErrors(std::move(data_sets));
  });
}

/// The same for the model that will use them. Throws FileError also when the file has another number of
/// layers.
inline LayerErrors load_layer_errors(const std::filesystem::path& file, const ModelShape& shape) {
  LayerErrors errors = load_layer_errors(file);
  detail::checked(file, [&] { errors.validate(shape.layers); });
  return errors;
}

/// Writes a ranking, one layer a line. `load_head_ranking` reads back an equal one.
/// Throws FileError when the folder is absent or the file cannot be written; an older file then stays as it
/// was.
inline void save_head_ranking(const std::filesystem::path& file, const HeadRanking& ranking) {
  detail::ObjectText text(detail::ObjectText::Lines::one_a_key);
  for (std::size_t layer = 0; layer < ranking.layers(); ++layer) {
    text.add(std::to_string(layer), detail::Json(ranking.heads(layer)));
  }
  detail::write_text(file, text.whole());
}

/// Writes raw scores, on one line because the released reader reads only the first. Numbers are written so
/// that `load_head_scores` reads back equal ones. Throws FileError as `save_head_ranking`, and when heads
/// have differing numbers of scores.
inline void save_head_scores(const std::filesystem::path& file, const HeadScores& scores) {
  detail::ObjectText text(detail::ObjectText::Lines::one);
  for (std::size_t layer = 0; layer < scores.layers(); ++layer) {
    for (std::size_t head = 0; head < scores.heads(); ++head) {
      const auto runs = scores.runs(layer, head);
      detail::require(runs.size() == scores.runs(0, 0).size(), file, "cannot be written, layer ", layer,
                      " head ", head, " has ", runs.size(), " scores, layer 0 head 0 has ",
                      scores.runs(0, 0).size(), ": every head has one score per counted run");
      text.add(std::to_string(layer) + "-" + std::to_string(head), detail::Json(runs));
    }
  }
  detail::write_text(file, text.whole());
}

/// Writes layer errors as one object, one data set a line, `avg_score` last. Numbers are written so that
/// `load_layer_errors` reads back equal ones. Throws FileError as `save_head_ranking`, and when a data set's
/// name stands twice, is `avg_score`, is not valid UTF-8 or has more than 256 bytes.
inline void save_layer_errors(const std::filesystem::path& file, const LayerErrors& errors) {
  detail::ObjectText text(detail::ObjectText::Lines::one_a_key);
  std::set<std::string> names{"avg_score"};
  for (const LayerErrors::DataSet& set : errors.data_sets()) {
    detail::require(names.insert(set.name).second, file, "cannot be written, data set name ",
                    detail::shown_text(set.name),
                    " is taken: each name may stand once, and avg_score is the mean's");
    detail::require_short_name(file, set.name);
    try {
      text.add(set.name, detail::Json(set.errors));
    } catch (const detail::Json::exception&) {
      detail::fail(file, "cannot be written, the name of data set ", names.size() - 2,
                   " is not valid UTF-8: rename it");
    }
  }
  text.add("avg_score", detail::Json(errors.average()));
  detail::write_text(file, text.whole());
}

}  // namespace compresskv::io
