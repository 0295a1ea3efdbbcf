// Vector clocks: what a thread knows to have happened.
//
// Every agent (a thread, a barrier on which copies complete, a warp group's wgmma) counts epochs;
// an access is stamped (agent, epoch). A thread that knows epoch e of agent a is ordered after all
// that a did up to e. Threads that have just met know the same, so they share one immutable vector:
// a barrier of n threads costs O(n), not O(n^2).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace warpformer::emulator {

/// An access's time: agent and epoch in one word; 0 is never.
struct Stamp {
  uint32_t bits = 0;
  static constexpr int kEpochBits = 21;
  static constexpr uint32_t kLastEpoch = (1u << kEpochBits) - 1;
  static Stamp of(int agent, uint32_t epoch) {
    return {static_cast<uint32_t>(agent) << kEpochBits | epoch};
  }
  int agent() const { return static_cast<int>(bits >> kEpochBits); }
  uint32_t epoch() const { return bits & kLastEpoch; }
  explicit operator bool() const { return bits != 0; }
};

/// A vector of epochs, one per agent: a value whose copies share memory until one changes.
class Clock {
 public:
  Clock() = default;  // knows nothing
  Clock(const Clock& other) : body_(other.body_) {
    if (body_) ++body_->users;
  }
  Clock(Clock&& other) noexcept : body_(other.body_) { other.body_ = nullptr; }
  Clock& operator=(Clock other) noexcept {
    std::swap(body_, other.body_);
    return *this;
  }
  ~Clock() { release(); }

  /// For all clocks of the launch; none may be alive.
  static void set_agents(int n) {
    if (n == agents) return;
    for (Body* body : unused) delete[] reinterpret_cast<uint32_t*>(body);
    unused.clear();
    agents = n;
  }
  uint32_t operator[](int agent) const { return body_ ? body_->epochs()[agent] : 0; }
  bool knows(Stamp s) const { return (*this)[s.agent()] >= s.epoch(); }
  bool shares(const Clock& other) const { return body_ == other.body_; }

  void set(int agent, uint32_t epoch) { own()[agent] = epoch; }
  void raise(int agent, uint32_t epoch) {
    if ((*this)[agent] < epoch) set(agent, epoch);
  }
  void join(const Clock& other) {
    if (!other.body_ || shares(other)) return;
    if (!body_) {
      *this = other;
      return;
    }
    uint32_t* mine = own();
    const uint32_t* theirs = other.body_->epochs();
    for (int i = 0, n = agents; i < n; ++i) mine[i] = std::max(mine[i], theirs[i]);
  }

 private:
  struct Body {
    uint32_t users;
    uint32_t* epochs() { return &users + 1; }
  };
  static inline int agents = 0;
  static inline std::vector<Body*> unused;

  static Body* make() {
    if (unused.empty()) return reinterpret_cast<Body*>(new uint32_t[agents + 1]);
    Body* body = unused.back();
    unused.pop_back();
    return body;
  }
  void release() {
    if (body_ && --body_->users == 0) unused.push_back(body_);
    body_ = nullptr;
  }
  uint32_t* own() {
    if (body_ && body_->users == 1) return body_->epochs();
    Body* body = make();
    if (body_) {
      std::memcpy(body->epochs(), body_->epochs(), sizeof(uint32_t) * agents);
    } else {
      std::memset(body->epochs(), 0, sizeof(uint32_t) * agents);
    }
    body->users = 1;
    release();
    body_ = body;
    return body_->epochs();
  }

  Body* body_ = nullptr;
};

}  // namespace warpformer::emulator
