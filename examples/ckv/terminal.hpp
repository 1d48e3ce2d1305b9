#pragma once

#include <chrono>
#include <string>
#include <string_view>

namespace ckv {

/// From here on Ctrl-C sets a flag, which `check_interrupt` looks at. A second Ctrl-C ends the program at
/// once.
void catch_interrupts();

/// Throws Interrupted when Ctrl-C was pressed.
void check_interrupt();

/// "1:05", "2:03:10"
std::string duration_text(std::chrono::seconds duration);

/// A line of progress on stderr with a bar and the time left, where stderr is a terminal; nothing elsewhere.
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
  Clock::time_point start_ = Clock::now();
  Clock::time_point shown_at_{};
  bool shown_ = false;
};

}  // namespace ckv
