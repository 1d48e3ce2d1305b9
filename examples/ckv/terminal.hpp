#pragma once

#include <chrono>
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace ckv {

/// From here on Ctrl-C and SIGTERM set a flag, which `check_interrupt` looks at. A second one ends the
/// program at once.
void catch_interrupts();

/// Throws Interrupted when there was such a signal.
void check_interrupt();

/// Opens what the program was started without, in a way that makes writing fail: else the first file opened
/// would become stdout, and receive what is printed.
void open_standard_streams();

/// Hands what was printed to the system. Throws engine::Error with its reason where it does not take it: a
/// full disk, a closed stream.
void flush_stdout();

/// A line on stderr, whether or not somebody takes it.
void complain(std::string_view message);

/// "1:05", "2:03:10"
std::string duration_text(std::chrono::seconds duration);

/// Columns that a line on `descriptor` may have: $COLUMNS, else the terminal's; no bound where it is none.
std::size_t columns_of(int descriptor);

/// The first `columns` characters of a text in UTF-8.
std::string_view cut(std::string_view text, std::size_t columns);

/// A text on stdout behind a word of its own, `indent` columns wide; broken between words where it is wider
/// than the terminal.
void print_entry(std::string_view what, std::string_view text, std::size_t indent);

/// A text on stdout; broken between words where it is wider than the terminal.
void print_text(std::string_view text);

/// A table on stdout. Where the terminal is narrower, each row, and the head with it, breaks into several
/// lines; what is wider than a line alone is cut.
class Table {
 public:
  struct Column {
    std::string title;
    std::size_t width = 0;  ///< with the blanks that part it from its neighbour
    bool left = false;      ///< its text starts where the column does, else it ends there
  };

  /// Prints the head.
  explicit Table(std::vector<Column> columns);

  /// Prints a row, a text a column.
  void row(const std::vector<std::string>& cells) const;

 private:
  std::vector<Column> columns_;
  std::size_t width_;
};

/// A line of progress on stderr with a bar and the time left, where stderr is a terminal; nothing elsewhere.
/// It never takes more than one line, and never goes back.
///
/// Debian has no C++ library for progress bars, and this is all that we need of one.
class Progress {
 public:
  /// `total` is the amount of work, in any unit that time is proportional to.
  Progress(std::string label, double total);
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  ~Progress();  ///< clears the line

  /// `done` of `total` is behind us; `note` says what is under way.
  void show(double done, std::string_view note = {});

  /// Takes the line away, so that something else can be printed; the next `show` brings it back.
  void clear();

 private:
  using Clock = std::chrono::steady_clock;

  std::string label_;
  double total_;
  double share_ = 0.0;  // shown last
  Clock::time_point start_ = Clock::now();
  Clock::time_point shown_at_{};
  bool shown_ = false;
};

}  // namespace ckv
