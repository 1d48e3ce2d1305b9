// Work on many prompts, shared out over processes.
#pragma once

#include <cstddef>
#include <functional>

#include "records.hpp"

namespace ckv {

using Take = std::function<void(const Json& record)>;

/// Does the task of a number and hands on what came of it.
using Worker = std::function<void(std::size_t task, const Take& hand_on)>;

/// Does tasks 0 to `tasks` - 1 in as many processes as `jobs` says. Each calls `start` once, which loads what
/// it needs, and takes its turn with the others. `take` hears in this process of all records and `done` of
/// all tasks, in the order of the tasks however many processes there are.
///
/// The processes end with this call, Ctrl-C and exceptions included, and with this process where it is
/// killed. To be called where no other thread runs: they are forks. Throws engine::Error with the message of
/// what failed there, Interrupted after Ctrl-C.
void share_out(std::size_t tasks, std::size_t jobs, const std::function<Worker()>& start, const Take& take,
               const std::function<void(std::size_t task)>& done);

}  // namespace ckv
