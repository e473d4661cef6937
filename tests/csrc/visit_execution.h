#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels/visit_plan.h"

// The sampled backward's plan on the CPU: made by as many threads as wanted, and executed by an adversary who
// decides which block goes on next, within what the items' gates allow. Memory is a model of who owns what.
namespace cce_tests {

// ---- Making a plan ----

// Threads in step, as a block of the GPU: see plan_visit_items().
class ThreadTeam {
 public:
  explicit ThreadTeam(int threads) : values(static_cast<size_t>(threads)), threads_(threads) {}

  void sync() {
    std::unique_lock<std::mutex> lock(mutex_);
    const uint64_t round = round_;
    if (++arrived_ == threads_) {
      arrived_ = 0;
      ++round_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return round_ != round; });
    }
  }

  int threads() const { return threads_; }

  std::vector<unsigned long long> values;

 private:
  const int threads_;
  int arrived_ = 0;
  uint64_t round_ = 0;
  std::mutex mutex_;
  std::condition_variable all_;
};

class TeamMember {
 public:
  TeamMember(ThreadTeam& team, int thread) : team_(team), thread_(thread) {}

  int thread() const { return thread_; }
  int threads() const { return team_.threads(); }
  void sync() {
    if (team_.threads() > 1) team_.sync();
  }
  uint32_t add(uint32_t* counter, uint32_t value) {
    return __atomic_fetch_add(counter, value, __ATOMIC_RELAXED);
  }
  unsigned long long exclusive_sum(unsigned long long value, unsigned long long& total) {
    sync();
    team_.values[static_cast<size_t>(thread_)] = value;
    sync();
    unsigned long long before = 0;
    total = 0;
    for (int k = 0; k < team_.threads(); ++k) {
      if (k == thread_) before = total;
      total += team_.values[static_cast<size_t>(k)];
    }
    return before;
  }

 private:
  ThreadTeam& team_;
  const int thread_;
};

struct VisitPlan {
  cce::VisitLayout layout;
  std::vector<uint32_t> counts;
  std::vector<cce::VisitItem> items;
  std::vector<uint32_t> pending;  // of each gate
};

// All memory holds garbage before, but the control block, as on the GPU.
inline VisitPlan make_visit_plan(const cce::VisitLayout& layout, const std::vector<uint32_t>& counts,
                                 int threads) {
  VisitPlan plan{layout, counts, {}, {}};
  const auto garbage = [](auto& memory, int64_t size) {
    memory.resize(static_cast<size_t>(size));
    std::memset(static_cast<void*>(memory.data()), 0xCD, memory.size() * sizeof(memory[0]));
  };
  std::vector<int> order;
  std::vector<uint32_t> chunk_begins;
  garbage(order, layout.strips);
  garbage(chunk_begins, 2 * (layout.max_chunks + 1));
  garbage(plan.items, layout.max_items);
  garbage(plan.pending, layout.max_gates());
  cce::VisitControl control{};
  const cce::VisitPlanArguments arguments = {layout,           plan.counts.data(),  &control,
                                             order.data(),     chunk_begins.data(), plan.pending.data(),
                                             plan.items.data()};
  cce::VisitPlanShared shared;
  std::memset(&shared, 0xCD, sizeof(shared));
  ThreadTeam team(threads);
  std::vector<std::thread> others;
  const auto work = [&](int thread) {
    TeamMember member(team, thread);
    cce::plan_visit_items(member, arguments, shared);
  };
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
  if (control.items > plan.items.size()) throw std::runtime_error("more items than max_items");
  plan.items.resize(control.items);
  return plan;
}

// ---- Executing it ----

// Who goes on next, of all that may.
enum class Adversary {
  kRandom,
  kOldest,  // as the list has it
  kNewest,  // what came last, as long as it may
  kVictim,  // one item stands still for as long as anything else can move
};

class VisitExecution {
 public:
  explicit VisitExecution(const VisitPlan& plan)
      : plan_(plan),
        layout_(plan.layout),
        pending_(plan.pending),
        ring_(static_cast<size_t>(layout_.ring_rows())),
        grad_c_(static_cast<size_t>(layout_.v) * static_cast<size_t>(layout_.slices)),
        rounded_(static_cast<size_t>(layout_.n) * static_cast<size_t>(layout_.slices_of_d())),
        state_(plan.items.size(), State::kListed) {
    for (int strip = 0; strip < layout_.strips; ++strip) {
      added_.emplace_back(rows_of(strip));
      left_.emplace_back(rows_of(strip));
    }
  }

  // Empty, or what went wrong first. A block holds up to `slots` items and does them in the order in which it
  // took them: with several, it waits for the second one's gates while it does the first.
  std::string run(Adversary adversary, int blocks, int slots, uint64_t seed) {
    std::mt19937_64 random(seed);
    const size_t items = plan_.items.size();
    const size_t victim = items == 0 ? 0 : random() % items;
    size_t taken = 0, done = 0;
    std::vector<std::deque<size_t>> held(std::min(items, static_cast<size_t>(blocks)));
    while (done < items && error_.empty()) {
      // A free slot takes the next item at once: what is held can then go on in any order.
      for (size_t full = 0; full < static_cast<size_t>(slots); ++full) {
        for (std::deque<size_t>& own : held) {
          if (own.size() <= full && taken < items) own.push_back(taken++);
        }
      }
      std::vector<size_t> movable;
      for (const std::deque<size_t>& own : held) {
        if (own.empty()) continue;
        const size_t k = own.front();
        if (state_[k] == State::kBegun || may_begin(plan_.items[k])) movable.push_back(k);
      }
      if (movable.empty()) {
        const auto stuck =
            std::find_if(held.begin(), held.end(), [](const auto& own) { return !own.empty(); });
        return "hang: no block can go on, with " + describe(stuck->front());
      }
      std::sort(movable.begin(), movable.end());
      const size_t k = choose(movable, adversary, victim, random);
      if (state_[k] == State::kListed) {
        state_[k] = State::kBegun;
        access(k, true);
      } else {
        access(k, false);
        finish(plan_.items[k]);
        for (std::deque<size_t>& own : held) {
          if (!own.empty() && own.front() == k) own.pop_front();
        }
        ++done;
      }
    }
    if (error_.empty()) check_end();
    return error_;
  }

 private:
  enum class State { kListed, kBegun };
  enum class Cell : uint8_t { kEmpty, kInUse, kDone };
  struct RingRow {
    Cell cell = Cell::kEmpty;
    int strip = -1;
    int64_t visit = -1;
    uint32_t reads = 0;  // items of dC that have yet to read it
  };

  static size_t choose(const std::vector<size_t>& movable, Adversary adversary, size_t victim,
                       std::mt19937_64& random) {
    switch (adversary) {
      case Adversary::kOldest:
        return movable.front();
      case Adversary::kNewest:
        return movable.back();
      case Adversary::kVictim:
        if (movable.size() > 1) {
          const size_t k = movable[random() % movable.size()];
          return k != victim ? k : movable.front() != victim ? movable.front() : movable.back();
        }
        return movable.front();
      case Adversary::kRandom:
        break;
    }
    return movable[random() % movable.size()];
  }

  bool may_begin(const cce::VisitItem& item) {
    for (const int gate : item.needs) {
      if (gate != cce::kNoGate && pending_.at(static_cast<size_t>(gate)) != 0) return false;
    }
    return true;
  }

  void finish(const cce::VisitItem& item) {
    for (const int gate : {item.gate, cce::second_gate(item)}) {
      if (gate != cce::kNoGate) --pending_.at(static_cast<size_t>(gate));
    }
  }

  // What item k does when it begins, and when it ends: in between all that it touches is in use.
  void access(size_t k, bool begins) {
    const cce::VisitItem& item = plan_.items[k];
    now_ = k;
    if (item.work == cce::VisitWork::kRound) {
      round(item, begins);
    } else if (item.strip < 0 || item.strip >= layout_.strips) {
      fail("no such strip");
    } else if (item.work == cce::VisitWork::kGradC) {
      grad_c(item, begins);
    } else {
      visit(item, begins);
    }
  }

  void visit(const cce::VisitItem& item, bool begins) {
    const auto strip = static_cast<size_t>(item.strip);
    const cce::VisitRange visits = cce::visits_of(item, rows_of(item.strip));
    if (visits.begin == visits.end) return fail("an item without visits");
    const bool adds = cce::adds_to_e(item.work), leaves = cce::leaves_dz(item.work);
    if (adds && begins && rounds_begun_ > 0) fail("adds to dE, which is being rounded");
    if (adds && !begins) ++adds_done_;
    for (int64_t visit = visits.begin; visit < visits.end; ++visit) {
      const auto rank = static_cast<size_t>(visit);
      if (adds && begins && ++added_[strip][rank] > 1) fail("a visit is added to dE twice");
      if (!leaves) continue;
      const size_t row = item.first_row + rank;
      if (row >= ring_.size()) return fail("beyond the ring");
      RingRow& to = ring_[row];
      if (begins) {
        if (to.cell == Cell::kInUse || to.reads > 0) return fail("overwrites a row of the ring in use");
        if (++left_[strip][rank] > 1) fail("a visit's dz is computed twice");
        to.cell = Cell::kInUse;
      } else {
        to = {Cell::kDone, item.strip, visit, cce::items_of_dc(rows_of(item.strip), layout_.slices)};
      }
    }
  }

  void grad_c(const cce::VisitItem& item, bool begins) {
    const uint32_t count = rows_of(item.strip);
    for (uint32_t visit = 0; visit < count; ++visit) {
      const size_t row = item.first_row + visit;
      if (row >= ring_.size()) return fail("beyond the ring");
      RingRow& from = ring_[row];
      if (from.cell != Cell::kDone || from.strip != item.strip || from.visit != visit) {
        return fail("reads dz that is not there");
      }
      if (!begins) --from.reads;
    }
    const cce::VisitRange slices = cce::slices_of(item, count, layout_.slices);
    if (slices.begin == slices.end) return fail("an item without slices");
    const int64_t first = static_cast<int64_t>(item.strip) * layout_.columns;
    for (int64_t v = first; v < first + layout_.columns && v < layout_.v; ++v) {
      if (begins && !sums_are_gone(v)) return fail("writes dC over sums of dE");
      for (int64_t slice = slices.begin; slice < slices.end; ++slice) {
        Cell& cell = grad_c_[static_cast<size_t>(v * layout_.slices + slice)];
        if (cell != (begins ? Cell::kEmpty : Cell::kInUse)) return fail("writes dC twice");
        cell = begins ? Cell::kInUse : Cell::kDone;
      }
    }
  }

  // Whether nothing of dE lives in row v of dC any more. sums_begin is the first element of a row, and two
  // rows in 16 bits hold one token's sums; before them lie the residual masses, which all rounding reads.
  bool sums_are_gone(int64_t v) const {
    if (!layout_.borrows()) return true;
    const int64_t first = layout_.sums_begin / layout_.d;
    if (v < first) return v < layout_.residual_begin / layout_.d || rounds_done_ == layout_.rounds();
    const auto slices = static_cast<size_t>(layout_.slices_of_d());
    const auto own = rounded_.begin() + static_cast<std::ptrdiff_t>((v - first) / 2 * layout_.slices_of_d());
    return std::count(own, own + static_cast<std::ptrdiff_t>(slices), Cell::kDone) ==
           static_cast<std::ptrdiff_t>(slices);
  }

  void round(const cce::VisitItem& item, bool begins) {
    const cce::RoundedPart part = cce::rounded_by(item, layout_);
    if (part.tokens.begin == part.tokens.end || part.slices.begin == part.slices.end) {
      return fail("an item without tokens");
    }
    if (begins) {
      ++rounds_begun_;
      if (adds_done_ != adds_listed()) fail("rounds dE before its last addition");
    } else {
      ++rounds_done_;
    }
    for (int64_t token = part.tokens.begin; token < part.tokens.end; ++token) {
      for (int64_t slice = part.slices.begin; slice < part.slices.end; ++slice) {
        Cell& cell = rounded_[static_cast<size_t>(token * layout_.slices_of_d() + slice)];
        if (cell != (begins ? Cell::kEmpty : Cell::kInUse)) return fail("rounds a token's dE twice");
        cell = begins ? Cell::kInUse : Cell::kDone;
      }
    }
  }

  uint32_t rows_of(int strip) const { return layout_.rows_of(plan_.counts.data(), strip); }

  int64_t adds_listed() const {
    int64_t adds = 0;
    for (const cce::VisitItem& item : plan_.items) adds += cce::adds_to_e(item.work);
    return adds;
  }

  void check_end() {
    for (size_t strip = 0; strip < added_.size(); ++strip) {
      for (size_t rank = 0; rank < added_[strip].size(); ++rank) {
        if (layout_.need_e && added_[strip][rank] != 1) return fail("a visit is missing in dE");
        if (layout_.slices > 0 && left_[strip][rank] != 1) return fail("a visit is missing in dC");
      }
    }
    for (const Cell cell : grad_c_) {
      if (cell != Cell::kDone) return fail("a row of dC is never written");
    }
    for (const Cell cell : rounded_) {
      if (layout_.need_e && cell != Cell::kDone) return fail("a token's dE is never rounded");
    }
    for (const cce::VisitItem& item : plan_.items) {
      for (const int gate : {item.gate, cce::second_gate(item)}) {
        if (gate != cce::kNoGate && pending_[static_cast<size_t>(gate)] != 0) {
          return fail("a gate is not open at the end");
        }
      }
    }
  }

  void fail(const std::string& what) {
    if (error_.empty()) error_ = what + ": " + describe(now_);
  }

  std::string describe(size_t k) const {
    const cce::VisitItem& item = plan_.items[k];
    std::ostringstream text;
    text << "item " << k << " (work " << static_cast<unsigned>(item.work) << ", strip " << item.strip
         << ", part " << item.part << ", gate " << item.gate << ", needs " << item.needs[0] << " and "
         << item.needs[1] << ")";
    return text.str();
  }

  const VisitPlan& plan_;
  const cce::VisitLayout& layout_;
  std::vector<uint32_t> pending_;
  std::vector<RingRow> ring_;
  std::vector<Cell> grad_c_;   // [v, slices]
  std::vector<Cell> rounded_;  // [n, slices of D]
  std::vector<State> state_;
  std::vector<std::vector<int>> added_, left_;  // [strips][rows]
  int64_t adds_done_ = 0;
  int rounds_begun_ = 0, rounds_done_ = 0;
  size_t now_ = 0;
  std::string error_;
};

}  // namespace cce_tests
