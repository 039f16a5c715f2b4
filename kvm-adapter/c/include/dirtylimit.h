/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * dirtylimit: keeps each vCPU's dirty page rate under a limit, by KVM's dirty ring. Made of the sources; do not edit.
 *
 * Rules for all calls:
 * - A function that gives an int answers 0 or a negative errno (dirtylimit_before_run() also 1); dirtylimit_last_error() has the
 *   words. None changes errno, prints (but where it panics), exits, or forks.
 * - A handle is a pointer that a call gave out and that was not freed. NULL is -EINVAL, but for what frees. A call that fails
 *   leaves NULL where the handle would be. Frees are not for handles that another thread uses at the same time.
 * - A struct that begins with its size is as long as it says. Larger ones than the library knows are taken where what it does
 *   not know is 0, and else refused with -E2BIG; in what the library fills in, that becomes 0.
 * - Calls may come from any thread, but not from a signal handler, unless they say otherwise. Signal handlers may interrupt
 *   any call.
 * - Nothing is lost by an error: pages that were collected stay dirty for a later merge.
 * - A bug of the library's is -ENOTRECOVERABLE: a Rust panic ends at the call. The handle is to be freed.
 *
 * Needs Linux 5.11 on x86-64, or 6.2 on arm64.
 */

#ifndef DIRTYLIMIT_H
#define DIRTYLIMIT_H

#include <stddef.h>
#include <stdint.h>

// The version that this header is of, as dirtylimit_version() gives it: a byte each for major, minor and patch.
#define DIRTYLIMIT_VERSION 256

// A rate: no limit.
#define DIRTYLIMIT_UNLIMITED UINT64_MAX

// A flag of dirtylimit_config_t: pauses end on time on a busy host too, because the thread of a limited vCPU asks the scheduler
// for its shortest time slice (Linux 6.12; takes no privilege).
#define DIRTYLIMIT_PROMPT 1

// kick_after_ns: nothing has to end the run.
#define DIRTYLIMIT_NO_KICK UINT64_MAX

// What dirtylimit_before_run() wants the vCPU's thread to do.
typedef enum {
    // Call KVM_RUN.
    DIRTYLIMIT_ENTER = 0,
    // A signal, an interrupter or stop() ended a pause: the VMM wants its thread for something else. See to that first, and
    // call dirtylimit_before_run() again: what is owed stays owed, and the ring may be full. A VMM that saves the vCPU's state
    // now calls KVM_RUN once before, with immediate_exit set: that completes an I/O exit which it has answered.
    DIRTYLIMIT_RETURN = 1,
} dirtylimit_decision;

// What ends a slice that the ring does not.
typedef enum {
    // The ring alone, and timers of the vCPU's thread where the CPU hands pages over in lumps (Intel's PML): no signal.
    DIRTYLIMIT_KICK_AUTO = 0,
    // Nothing: the vCPU runs until its ring is full, and pays for that.
    DIRTYLIMIT_KICK_OFF = 1,
    // The library, by the real-time signal kick_signal, which is its own. Not for VMMs that use KVM_SET_SIGNAL_MASK.
    DIRTYLIMIT_KICK_SIGNAL = 2,
    // The VMM: when a limit was set, and when kick_after_ns has passed since dirtylimit_before_run() returned.
    DIRTYLIMIT_KICK_VMM = 3,
} dirtylimit_kick;

// Why a limit is not held.
typedef enum {
    // It is held, or there is none.
    DIRTYLIMIT_HELD = 0,
    // No tick has come for 5 s.
    DIRTYLIMIT_LAPSED = 1,
    // The vCPU's thread does not come to pay.
    DIRTYLIMIT_NOT_ACCEPTED = 2,
    // A pause longer than the longest would be needed: needs_pause_ns.
    DIRTYLIMIT_NEEDS_PAUSE = 3,
    // The vCPU exceeds it all the same.
    DIRTYLIMIT_EXCEEDED = 4,
    // The guest writes to pages that nobody takes, and a page that is not taken is not counted again.
    DIRTYLIMIT_LOG_NOT_TAKEN = 5,
    // It is held by pauses longer than the longest.
    DIRTYLIMIT_LUMPS = 6,
    // Something else, which the text tells.
    DIRTYLIMIT_OTHER = 7,
} dirtylimit_why;

// What ends the pauses of one vCPU.
typedef struct dirtylimit_interrupter_t dirtylimit_interrupter_t;

// One VM under the limiter.
typedef struct dirtylimit_t dirtylimit_t;

// One round of the dirty log, whose pages are to be merged slot by slot.
typedef struct dirtylimit_round_t dirtylimit_round_t;

// A thread that ticks.
typedef struct dirtylimit_throttle_t dirtylimit_throttle_t;

// One vCPU, beside the VMM's own: for its thread of the moment.
typedef struct dirtylimit_vcpu_t dirtylimit_vcpu_t;

// How to limit a VM. Set size to its sizeof and the rest to 0: 0 is the default of each field, those of later versions too.
typedef struct {
    // sizeof(dirtylimit_config_t).
    size_t size;
    // Entries in each vCPU's ring: a power of two, 1,024 (the default) to 65,536; 256 and 512 where the CPU has no PML.
    uint32_t ring_entries;
    // One of dirtylimit_kick.
    uint32_t kick;
    // With DIRTYLIMIT_KICK_SIGNAL: SIGRTMIN to SIGRTMAX.
    int32_t kick_signal;
    // DIRTYLIMIT_PROMPT or 0.
    uint32_t flags;
    // The longest single pause of a vCPU, from 100 µs to 1 s (clamped); 10 ms by default.
    uint64_t max_pause_ns;
} dirtylimit_config_t;

// Says whether a pause shall end, by any number but 0. Called on the vCPU's thread, in pauses, at least every 10 ms. It must
// return: no longjmp, no C++ exception.
typedef int (*dirtylimit_stop_t)(void *opaque);

// What is known of one vCPU. Set size to its sizeof. Rates are in bytes a second.
typedef struct {
    // sizeof(dirtylimit_status_t).
    size_t size;
    // The limit set for it, or DIRTYLIMIT_UNLIMITED.
    uint64_t limit;
    // The limit in force, or DIRTYLIMIT_UNLIMITED: the lesser of its own and its share of the VM's budget.
    uint64_t effective_limit;
    // Its dirty page rate, smoothed over 100 ms, as of the last tick.
    uint64_t rate;
    // The rate that it would have if it did not pause.
    uint64_t demand;
    // Where the limit cannot be held within the longest pause: the pause that it would need; else 0.
    uint64_t needs_pause_ns;
    // Pages newly dirty since each was last published, since the vCPU was added: what a migration has to send.
    uint64_t net_pages;
    // The same, and pages written again before they were published.
    uint64_t gross_pages;
    // Exits with a full ring.
    uint64_t full_exits;
    // Microseconds paused.
    uint64_t paused_us;
    // Pages whose entries wait in the ring: dirty, and not in the log yet.
    uint32_t held_back;
    // One of dirtylimit_why, as far as seen in the last seconds.
    uint32_t unenforced;
    // The same in words, valid for ever; NULL where the limit is held, or there is none.
    const char *unenforced_text;
} dirtylimit_status_t;

// What was harvested of a VM so far. Set size to its sizeof.
typedef struct {
    // sizeof(dirtylimit_stats_t).
    size_t size;
    // Entries given back by resets.
    uint64_t resets;
    // KVM_RESET_DIRTY_RINGS calls.
    uint64_t reset_calls;
    // Resets that may have left pages unprotected, because they were short or the thread was stopped on the way: of each at
    // most 64 pages of a vCPU.
    uint64_t suspect_resets;
    // Pages that are therefore in every merge, now.
    uint64_t suspect_pages;
    // Collected entries that named no slot, or a page beyond its end.
    uint64_t dropped;
    // The soft limit of the rings as far as learned, the lowest of them; 0 before the first vCPU.
    uint64_t soft_limit;
    // Resets that failed, or gave nothing back: what was collected waits for a later one.
    uint64_t failed_resets;
    // Full exits that ended in -EIO, since nothing moved in the ring: the pages of that vCPU are unknown.
    uint64_t wedged;
} dirtylimit_stats_t;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// What the last call that failed on this thread has to say, as a sentence in English without a full stop; "" if none has.
// Any thread; not from a signal handler. The text is the thread's until it calls this again, or ends.
const char *dirtylimit_last_error(void);

// The version of the library: a byte each for major, minor and patch. A library of the same major and minor version as
// DIRTYLIMIT_VERSION, and a patch version at least as high, is compatible with this header. Any thread, any signal handler.
uint32_t dirtylimit_version(void);

// Enables the dirty ring on a VM: right after KVM_CREATE_VM, before its slots and vCPUs. vm_fd may be closed afterwards. config
// may be NULL, for the default. From here on KVM_GET_DIRTY_LOG fails on x86; dirtylimit_round() and dirtylimit_last_round() take
// its place. Any thread.
//
// -EOPNOTSUPP: this KVM has no ring of a kind that the machine can use. -EINVAL: the ring's size, the kick or its signal are not
// allowed. -E2BIG: config asks for something that only a later version of the library knows. -EBUSY: the signal is handled or
// ignored already. Others: what KVM answered; the text tells what to do.
int dirtylimit_enable(int vm_fd, const dirtylimit_config_t *config, dirtylimit_t **limit);

// Frees the VM's handle. NULL is none. Handles of vCPUs, rounds, interrupters and throttle threads stay valid until they are freed
// themselves; the thread stops ticking. Any thread.
void dirtylimit_free(dirtylimit_t *limit);

// The size of the pages that slots and dirty logs count, in bytes: the host's. Any thread.
uint32_t dirtylimit_page_size(dirtylimit_t *limit);

// The largest ring whose pages that rounds hold back take at most half of a migration's downtime to send, for
// dirtylimit_config_t's ring_entries: 1,024 to 65,536. bandwidth is the wire's, in bytes a second; vcpus are those that write. Any
// thread.
uint32_t dirtylimit_ring_for(uint64_t downtime_ns, uint64_t bandwidth, uint32_t vcpus);

// Makes a memory slot known (address space << 16 | slot), before it is created in KVM or its logging switched on: pages of unknown
// slots are in no dirty log. A slot that is known with that size stays as it is. The VMM must not enable
// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2. Any thread.
//
// -EEXIST: known with another size. -EINVAL: 0 pages, or 2^31 and more.
int dirtylimit_add_slot(dirtylimit_t *limit, uint32_t slot, uint64_t pages);

// Collects and forgets a slot, with what is dirty in it, before it is deleted or changed in KVM. One that is not known is none to
// forget. Any thread.
//
// Any error: KVM_RESET_DIRTY_RINGS failed, and the slot is known still.
int dirtylimit_remove_slot(dirtylimit_t *limit, uint32_t slot);

// Limits a vCPU to that many bytes a second of newly dirty pages, in force while ticks come (dirtylimit_tick(),
// dirtylimit_throttle_start()); DIRTYLIMIT_UNLIMITED lifts its limit, and ends a pause at once. Any thread.
//
// -ENOENT: no such vCPU. -EINVAL: 0.
int dirtylimit_set_limit(dirtylimit_t *limit, uint32_t id, uint64_t bytes_per_second);

// As dirtylimit_set_limit(), for every vCPU, present and to come.
int dirtylimit_set_limit_all(dirtylimit_t *limit, uint64_t bytes_per_second);

// Sets the budget of the whole VM, shared by max-min fairness among its vCPUs' demands; DIRTYLIMIT_UNLIMITED lifts it. Any thread.
//
// -EINVAL: 0.
int dirtylimit_set_vm_limit(dirtylimit_t *limit, uint64_t bytes_per_second);

// How much a vCPU counts in the split of the VM's budget: 1 until told otherwise. Any thread.
//
// -ENOENT: no such vCPU.
int dirtylimit_set_weight(dirtylimit_t *limit, uint32_t id, uint32_t weight);

// Changes the longest single pause of a vCPU, from 100 µs to 1 s (clamped). Any thread.
int dirtylimit_set_max_pause(dirtylimit_t *limit, uint64_t max_pause_ns);

// One tick: measures each vCPU, and sets its penalty. For a VMM's event loop, every 10 to 100 ms. Limits lapse 5 s after the last
// tick. Any thread.
int dirtylimit_tick(dirtylimit_t *limit);

// Ticks every period_ns (1 ms to 1 s, clamped) on the calling thread, whose name, priority and seccomp filter are the VMM's, until
// stop(opaque), which is asked before each tick, returns anything but 0.
int dirtylimit_run_throttle(dirtylimit_t *limit, uint64_t period_ns, dirtylimit_stop_t stop, void *opaque);

// Ticks every period_ns (1 ms to 1 s, clamped) from a thread of its own, with all signals blocked and the seccomp filter of the
// calling one. Any thread.
//
// -EAGAIN and others: no thread can be started.
int dirtylimit_throttle_start(dirtylimit_t *limit, uint64_t period_ns, dirtylimit_throttle_t **throttle);

// Ends the thread, and waits for its end. NULL is none. Any thread.
void dirtylimit_throttle_stop(dirtylimit_throttle_t *throttle);

// Maps a vCPU's dirty ring and makes a handle of it; after KVM_CREATE_VCPU and before its first KVM_RUN. id is the caller's.
// After the handle was freed, the same id and descriptor attach to the same ring again. vcpu_fd may be closed afterwards. Any
// thread.
//
// -EBUSY: the vCPU has a handle, or its ring was consumed by somebody else. -EEXIST, -EBADF: id and descriptor do not belong
// together. -ENXIO: it has no ring, since the VM had none when it was created, or is another. -ENOSPC: there are too many.
int dirtylimit_add_vcpu(dirtylimit_t *limit, uint32_t id, int vcpu_fd, dirtylimit_vcpu_t **vcpu);

// Frees a vCPU's handle; its ring, and what is dirty in it, stays with the VM. NULL is none. The vCPU's thread, or any once that
// thread is done with it.
//
// -EBUSY: somebody is inside dirtylimit_before_run(), and the handle stays.
int dirtylimit_vcpu_free(dirtylimit_vcpu_t *vcpu);

// Collects what a vCPU's ring holds and forgets the vCPU, for VMMs that never run it again. Not needed at the end of a VM. Any
// thread.
//
// -ENOENT: no such vCPU. -EBUSY: it has a handle. Any other: the pages cannot be reset, and the vCPU stays.
int dirtylimit_remove_vcpu(dirtylimit_t *limit, uint32_t id);

// To be called before each KVM_RUN, limit or not: pays what is owed, and frees room in a full ring. The VMM does nothing at
// KVM_EXIT_DIRTY_RING_FULL but to come here. Answers DIRTYLIMIT_ENTER or DIRTYLIMIT_RETURN, or a negative errno.
//
// Pauses at most max_pause_ns a call (and 2.1 ms where others hold the VM's lock, or as long as a lump of pages takes where no
// timer ends it). A signal to the thread ends a pause at once, kvm_run.immediate_exit within 10 ms; while that is set there is
// no pause: the answer is DIRTYLIMIT_ENTER.
//
// kick_after_ns may be NULL; else it is set to the time after which the VMM shall make KVM_RUN return, with
// DIRTYLIMIT_KICK_VMM, or to DIRTYLIMIT_NO_KICK.
//
// The vCPU's thread, signal handlers included: allocates nothing and waits for no lock. A handler of the vCPU's thread may also
// block for as long as it likes in the middle of a call, for the VM to be stopped: the library's locks are free then.
//
// -EBUSY: called by two threads at once, or by a handler that has interrupted it. -EIO: the ring is wedged, and every page of
// the VM must be sent again, or KVM_RESET_DIRTY_RINGS gave too little back: the text tells. -EXDEV: a vCPU of this VM is
// another VM's.
int dirtylimit_before_run(dirtylimit_vcpu_t *vcpu, uint64_t *kick_after_ns);

// As dirtylimit_before_run(), for VMMs that block their kick signal outside KVM_RUN: a pause also ends within 10 ms of stop(opaque)
// returning anything but 0 (whether a signal is pending, say). stop may be NULL.
int dirtylimit_before_run_unless(dirtylimit_vcpu_t *vcpu, dirtylimit_stop_t stop, void *opaque, uint64_t *kick_after_ns);

// Makes what ends the vCPU's pauses. It may outlive the vCPU's handle; the same vCPU, attached again, has the same. Any thread.
int dirtylimit_interrupter(dirtylimit_vcpu_t *vcpu, dirtylimit_interrupter_t **interrupter);

// Makes the vCPU's current dirtylimit_before_run(), or else the next one that would pause, answer DIRTYLIMIT_RETURN at once. Not
// needed where the VMM's kick is a signal to the thread that is open outside KVM_RUN. Any thread, any signal handler.
int dirtylimit_interrupt(dirtylimit_interrupter_t *interrupter);

// Frees it. NULL is none. Any thread.
void dirtylimit_interrupter_free(dirtylimit_interrupter_t *interrupter);

// A round of the dirty log over a running VM: collects, resets, publishes. Of limited vCPUs it leaves the newest pages in their
// rings, for a later round, so that they stay inside their slices. Free it after its slots were merged. Any thread; a round
// itself is used by one thread at a time.
//
// -ENOENT, once, after everything was published: the guest has dirtied pages of slots that are not known, or shorter than KVM's,
// and they are in no dirty log. -EIO and others: KVM_RESET_DIRTY_RINGS failed, and nothing is lost by it.
int dirtylimit_round(dirtylimit_t *limit, dirtylimit_round_t **round);

// For the last rounds of a migration: with 1 each round empties the rings of limited vCPUs too, and kicks end their slices, so
// that it leaves nothing in them; 0 ends that. With DIRTYLIMIT_KICK_VMM the VMM kicks its vCPUs after the call. Any thread.
//
// -EOPNOTSUPP: the ring alone ends slices (DIRTYLIMIT_KICK_AUTO or _OFF); a smaller one (dirtylimit_ring_for()) holds less back.
int dirtylimit_set_draining(dirtylimit_t *limit, int draining);

// The last round: complete. No vCPU is in KVM_RUN, and none enters until its slots were merged. On arm64 it reads the backup
// bitmap, so call it after the interrupt controller's tables were saved. Free it. Any thread but a vCPU's that is stopped by it.
//
// As dirtylimit_round(); -EINVAL: KVM has more pages in a slot than it was added with.
int dirtylimit_last_round(dirtylimit_t *limit, dirtylimit_round_t **round);

// Ors the dirty pages of a slot into bitmap, in the form of KVM_GET_DIRTY_LOG: a bit a page from the slot's first, 64 a word; and
// forgets them. bitmap is aligned to 8 bytes and has at least (pages of the slot + 63) / 64 * 8 of them; nobody else uses it
// meanwhile. pages may be NULL; else the number of pages is added to it. The round's thread.
//
// -ENOENT: no such slot. -EINVAL: the bitmap is too short, or not aligned, and nothing is forgotten.
int dirtylimit_merge(dirtylimit_round_t *round, uint32_t slot, void *bitmap, size_t bytes, uint64_t *pages);

// Ors the pages of a slot into bitmap that are dirty by now, as dirtylimit_merge does, but forgets none: nothing is reset, and no
// page costs the guest another fault. A migration leaves out of the round that goes on what it would send again. A hint: what
// KVM has not pushed yet (PML), and what is only in the backup bitmap (arm64), is missing. Any thread.
//
// -ENOENT: no such slot. -EINVAL: the bitmap is too short, or not aligned.
int dirtylimit_peek(dirtylimit_t *limit, uint32_t slot, void *bitmap, size_t bytes);

// Ring entries that the round itself has collected, reset and published; what vCPUs have published since the last merge comes
// on top. 0 for NULL. The round's thread.
uint64_t dirtylimit_round_published(dirtylimit_round_t *round);

// Pages that a round over a running VM has left in the rings of limited vCPUs: dirty, not in its log, and a floor under the
// downtime. 0 for the last round, and for NULL. The round's thread.
uint64_t dirtylimit_round_held_back(dirtylimit_round_t *round);

// Frees a round. What was not merged is in the next. NULL is none.
void dirtylimit_round_free(dirtylimit_round_t *round);

// Makes pages of a slot dirty that no vCPU wrote: what the VMM, its devices or vhost write into guest memory, which KVM does not
// log. They are in the next round, and no vCPU is charged for them. Call it after the write: a page that is
// marked before may be taken by a round that comes between. Any thread.
//
// -ENOENT: no such slot. -EINVAL: the pages end beyond it, and none is marked.
int dirtylimit_mark_dirty(dirtylimit_t *limit, uint32_t slot, uint64_t first_page, uint64_t pages);

// Says that a slot's suspect pages (dirtylimit_stats_t) are protected again: with the vCPUs stopped, switch
// KVM_MEM_LOG_DIRTY_PAGES of the slot off and on, and merge it, before this call. Any thread.
//
// -ENOENT: no such slot.
int dirtylimit_trust_slot(dirtylimit_t *limit, uint32_t slot);

// Tells what is known of a vCPU, as of the last dirtylimit_meter() or tick. Any thread.
//
// -ENOENT: no such vCPU.
int dirtylimit_query(dirtylimit_t *limit, uint32_t id, dirtylimit_status_t *status);

// Tells what was harvested so far. Any thread.
int dirtylimit_stats(dirtylimit_t *limit, dirtylimit_stats_t *stats);

// Brings the counts of dirtylimit_query() up to date. Disturbs no guest. Any thread.
int dirtylimit_meter(dirtylimit_t *limit);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* DIRTYLIMIT_H */
