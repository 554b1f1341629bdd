// Cooperative stages for the bounded and the timed simulation: each runs on a stack of its own until it waits for a stream.
//
// The switch is a dozen instructions on x86-64 and aarch64; QL_UCONTEXT (or another processor) uses the C library's, which costs two system
// calls per switch.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(QL_UCONTEXT) && !(defined(__ELF__) && (defined(__x86_64__) || defined(__aarch64__)))
#define QL_UCONTEXT 1
#endif
#ifdef QL_UCONTEXT
#include <ucontext.h>
#endif

namespace ql {

struct Channel;

#ifndef QL_UCONTEXT
// ql_switch(&from, to): push what a call must keep, store the stack pointer in *from, continue on the stack `to`.
extern "C" void ql_switch(void** from, void* to);
#if defined(__x86_64__)
asm(".text\n.weak ql_switch\n.hidden ql_switch\n.type ql_switch, @function\nql_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n.size ql_switch, .-ql_switch\n");
#else
asm(".text\n.weak ql_switch\n.hidden ql_switch\n.type ql_switch, %function\nql_switch:\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp, #0]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\nstp x27, x28, [sp, #64]\n"
    "stp x29, x30, [sp, #80]\nstp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
    "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp, #0]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\nldp x27, x28, [sp, #64]\n"
    "ldp x29, x30, [sp, #80]\nldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\nret\n.size ql_switch, .-ql_switch\n");
#endif
#endif

struct Stage {
    std::string name;
    std::function<void()> body;
    Channel* waits = nullptr;
    bool writes = false, done = false, failed = false;
    std::string error;
    uint64_t now = 0, ticks = 0;
    void* stack = nullptr;
#ifdef QL_UCONTEXT
    ucontext_t context;
#else
    void* pointer = nullptr;
#endif
};

inline std::string blocked(const Stage& s);

class Scheduler;
inline Scheduler& scheduler();

class Scheduler {
    static const size_t STACK = size_t(64) << 20;  // reserved, not used: pages come when touched
    std::vector<std::unique_ptr<Stage>> stages;
    std::deque<Stage*> ready;
    Stage* running = nullptr;
#ifdef QL_UCONTEXT
    ucontext_t home;
#else
    void* home = nullptr;
#endif

    static void enter();
    void body() {
        Stage& s = *running;
        try {
            s.body();
        } catch (const std::exception& e) {
            s.failed = true;
            s.error = e.what();
        }
        s.done = true;
        leave();
    }
    void leave() {
#ifdef QL_UCONTEXT
        swapcontext(&running->context, &home);
#else
        ql_switch(&running->pointer, home);
#endif
    }
    void resume(Stage* s) {
        running = s;
#ifdef QL_UCONTEXT
        swapcontext(&home, &s->context);
#else
        ql_switch(&home, s->pointer);
#endif
        running = nullptr;
    }
    void prepare(Stage& s) {
        s.stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (s.stack == MAP_FAILED) throw std::runtime_error("no memory for the stack of stage " + s.name);
#ifdef QL_UCONTEXT
        getcontext(&s.context);
        s.context.uc_stack.ss_sp = s.stack;
        s.context.uc_stack.ss_size = STACK;
        s.context.uc_link = nullptr;
        makecontext(&s.context, &Scheduler::enter, 0);
#else
        void** top = reinterpret_cast<void**>(static_cast<char*>(s.stack) + STACK);
#if defined(__x86_64__)
        *--top = nullptr;                                    // keeps the stack aligned as after a call
        *--top = reinterpret_cast<void*>(&Scheduler::enter);  // where `ret` goes
        for (int i = 0; i < 6; ++i) *--top = nullptr;
#else
        top -= 20;
        for (int i = 0; i < 20; ++i) top[i] = nullptr;
        top[11] = reinterpret_cast<void*>(&Scheduler::enter);  // x30
#endif
        s.pointer = top;
#endif
    }

   public:
    std::string error;   // a failed stage
    std::string report;  // a deadlock: one line per blocked stage
    std::vector<std::pair<std::string, uint64_t>> ticks;

    Stage& current() { return *running; }
    void tick() {
        ++running->now;
        ++running->ticks;
    }
    void add(const char* name, std::function<void()> body) {
        stages.emplace_back(new Stage);
        stages.back()->name = name;
        stages.back()->body = body;
    }
    void wait(Channel* c, bool writes);
    void wake(Stage*& s) {
        ready.push_back(s);
        s->waits = nullptr;
        s = nullptr;
    }
    void run() {
        error.clear();
        report.clear();
        ticks.clear();
        for (auto& s : stages) {
            prepare(*s);
            ready.push_back(s.get());
        }
        while (!ready.empty()) {
            Stage* s = ready.front();
            ready.pop_front();
            resume(s);
        }
        for (auto& s : stages) {
            ticks.emplace_back(s->name, s->ticks);
            if (s->failed && error.empty()) error = "stage " + s->name + ": " + s->error;
            if (!s->done) report += (report.empty() ? "" : "\n") + blocked(*s);
            munmap(s->stack, STACK);
        }
        stages.clear();
    }
};

inline Scheduler& scheduler() {
    static Scheduler one;
    return one;
}

inline void Scheduler::enter() { scheduler().body(); }

}  // namespace ql
