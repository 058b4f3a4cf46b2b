// Numbers from each process of a group to each other, through shared memory.
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

// A cache line. The turn is written after the numbers and read before them.
typedef struct {
    uint32_t turn, unused;
    int64_t numbers[7];
} slot_t;

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Write the numbers of a turn and wake those who wait for them.
void post(int64_t width, int64_t turn, slot_t *slot, const int64_t *numbers) {
    for (int64_t i = 0; i < width; i++) slot->numbers[i] = numbers[i];
    __atomic_store_n(&slot->turn, (uint32_t)turn, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &slot->turn, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

// Returns 1 with the numbers of the turn, or 0 if they are not there after `wait` nanoseconds. For the first `spin` of
// them this thread only yields the processor, then it sleeps.
int64_t collect(int64_t width, int64_t turn, int64_t spin, int64_t wait, slot_t *slot, int64_t *numbers) {
    int64_t start = nanoseconds();
    for (;;) {
        uint32_t seen = 0;
        for (int i = 0; i < 64; i++) {
            seen = __atomic_load_n(&slot->turn, __ATOMIC_SEQ_CST);
            if (seen == (uint32_t)turn) {
                for (int64_t j = 0; j < width; j++) numbers[j] = slot->numbers[j];
                return 1;
            }
            pause_briefly();
        }
        int64_t left = wait - (nanoseconds() - start);
        if (left <= 0) return 0;
        if (wait - left < spin) {
            sched_yield();
        } else {
            struct timespec most = {left / 1000000000, left % 1000000000};
            syscall(SYS_futex, &slot->turn, FUTEX_WAIT, seen, &most, NULL, 0);
        }
    }
}
