// hls::stream for simulation where the vendor's headers are not installed.
//
// QL_MODE 0, fast: stages run one after the other on FIFOs without bound.
// QL_MODE 1, fifo: stages are fibers on FIFOs of the declared depth; when none can run, the deadlock is described.
// QL_MODE 2, timed: as fifo, with a clock per stage. A token carries the cycle in which it was written; a read waits for the cycle after it,
//            a write into a full FIFO for the cycle after the read that made room.
#pragma once
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#ifndef QL_MODE
#define QL_MODE 0
#endif
#define QL_SIMULATION 1

#include "ql_fiber.h"

namespace ql {

struct Channel {
    std::string name;
    uint64_t depth = 0;     // 0: no bound
    uint64_t declared = 0;  // what the generated source asks for
    uint64_t head = 0, tail = 0, mark = 0;
    Stage* reader = nullptr;  // a stage that waits for data
    Stage* writer = nullptr;  // a stage that waits for room

    uint64_t fill() const { return tail - head; }
};

inline std::string blocked(const Stage& s) {
    if (!s.waits) return "stage " + s.name + " did not finish";
    const Channel& c = *s.waits;
    std::string fill = std::to_string(c.fill()) + (c.depth ? " of " + std::to_string(c.depth) : " (no bound)");
    return "stage " + s.name + (s.writes ? " waits to write " : " waits to read ") + c.name + ", which holds " + fill;
}

inline void Scheduler::wait(Channel* c, bool writes) {
    Stage* s = running;
    s->waits = c;
    s->writes = writes;
    (writes ? c->writer : c->reader) = s;
    leave();
}

inline std::vector<Channel*>& channels() {
    static std::vector<Channel*> all;
    return all;
}

// Depths an experiment asks for instead of the declared ones, by name.
inline std::map<std::string, uint64_t>& forced() {
    static std::map<std::string, uint64_t> depths;
    return depths;
}

// Empties every stream and sets its bound: 0 none, otherwise the declared depth.
inline void reset(bool bounded) {
    for (Channel* c : channels()) {
        c->head = c->tail = c->mark = 0;
        c->reader = c->writer = nullptr;
        c->depth = !bounded ? 0 : forced().count(c->name) ? forced()[c->name] : c->declared;
    }
}

}  // namespace ql

namespace hls {

template <typename T> class stream : public ql::Channel {
    T* ring = nullptr;
    uint64_t slots = 0;
#if QL_MODE == 2
    std::vector<uint64_t> written, freed;
#endif

    void resize(uint64_t n) {
        T* larger = new T[n];
        for (uint64_t i = head; i != tail; ++i) larger[i & (n - 1)] = ring[i & (slots - 1)];
#if QL_MODE == 2
        std::vector<uint64_t> w(n, 0), f(n, 0);
        for (uint64_t i = head; i != tail; ++i) w[i & (n - 1)] = written[i & (slots - 1)];
        // times of freed places beyond the old ring are those of the last `slots` reads
        for (uint64_t i = head > slots ? head - slots : 0; i != head; ++i) f[i & (n - 1)] = freed[i & (slots - 1)];
        written.swap(w);
        freed.swap(f);
#endif
        delete[] ring;
        ring = larger;
        slots = n;
    }

   public:
    explicit stream(const char* label = "stream") {
        name = label;
        ql::channels().push_back(this);
    }
    stream(const stream&) = delete;
    ~stream() {
        delete[] ring;
        std::vector<ql::Channel*>& all = ql::channels();
        for (size_t i = 0; i < all.size(); ++i)
            if (all[i] == this) all.erase(all.begin() + long(i--));
    }

    bool empty() const { return head == tail; }
    uint64_t size() const { return fill(); }

    T read() {
#if QL_MODE == 0
        if (head == tail) throw std::runtime_error("read from the empty stream " + name);
#else
        while (head == tail) ql::scheduler().wait(this, false);
#endif
        T value = ring[head & (slots - 1)];
#if QL_MODE == 2
        ql::Stage& s = ql::scheduler().current();
        uint64_t ready = written[head & (slots - 1)] + 1;
        if (s.now < ready) s.now = ready;
        freed[head & (slots - 1)] = s.now;
#endif
        ++head;
#if QL_MODE != 0
        if (writer) ql::scheduler().wake(writer);
#endif
        return value;
    }
    void read(T& value) { value = read(); }

    void write(const T& value) {
#if QL_MODE != 0
        while (depth && fill() >= depth) ql::scheduler().wait(this, true);
#endif
#if QL_MODE == 2
        ql::Stage& s = ql::scheduler().current();
#endif
        if (fill() == slots || (depth && slots < depth)) {
            uint64_t n = slots ? slots : 16;
            while (n == fill() || (depth && n < depth)) n *= 2;
            if (n != slots) resize(n);
        }
#if QL_MODE == 2
        if (depth && tail >= depth && s.now < freed[(tail - depth) & (slots - 1)] + 1) s.now = freed[(tail - depth) & (slots - 1)] + 1;
        written[tail & (slots - 1)] = s.now;
#endif
        ring[tail & (slots - 1)] = value;
        ++tail;
        if (mark < fill()) mark = fill();
#if QL_MODE != 0
        if (reader) ql::scheduler().wake(reader);
#endif
    }
};

}  // namespace hls

#if QL_MODE == 0
#define QL_CYCLE()
#define QL_STAGE(label, ...) __VA_ARGS__
#define QL_RUN()
#else
#define QL_CYCLE() ql::scheduler().tick()
#define QL_STAGE(label, ...) ql::scheduler().add(label, [&, images]() { __VA_ARGS__; })
#define QL_RUN() (ql::reset(true), ql::scheduler().run())
#endif
#define QL_DEPTH(s, n) (s).declared = (n)
