/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * A VMM in C that limits its guest: two vCPUs that write memory over and over, two memory slots, a copy of the guest made from
 * the dirty log alone. The lines marked "dirtylimit" are what a VMM has to add.
 *
 * It shows a limit held, vCPUs stopped and resumed in two ways (by a kick out of their loop, and inside the kick's signal
 * handler, as kvmtool does), rounds of the dirty log, and that the copy has lost nothing. Exit status 77: there is no KVM.
 *
 *     cc -std=c11 -o vmm vmm.c $(pkg-config --cflags --libs dirtylimit) -lpthread
 */
#define _GNU_SOURCE
#include <dirtylimit.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef __x86_64__
#error "the guest is written for x86-64"
#endif

enum { VCPUS = 2, SLOTS = 1 + VCPUS, PAGE = 4096, IMAGE = 0x100000 };
enum { LOW = 4 << 20, WORK = 16 << 20, MEMORY = LOW + VCPUS * WORK, SCRATCH = LOW - PAGE };
#define LIMIT (10ull << 20) /* bytes a second */
#define MS 1000000ull

/* Long mode, ring 3: rdi = first byte, rsi = end, rdx = a page. One word of each page, again and again. */
__asm__(".pushsection .rodata\n"
        "guest: mov %rdi, %rax\n"
        "1: incq (%rax)\n"
        "add %rdx, %rax\n"
        "cmp %rsi, %rax\n"
        "jb 1b\n"
        "jmp guest\n"
        "guest_end: .popsection\n");
extern const char guest[], guest_end[];

struct slot {
	uint64_t start, bytes;
	uint64_t *bitmap;
};

struct vcpu {
	int fd;
	int resume; /* a semaphore of its own, or a vCPU would take what is to wake another */
	volatile struct kvm_run *run;
	pthread_t thread;
	dirtylimit_vcpu_t *paced;                /* dirtylimit */
	dirtylimit_interrupter_t *interrupter;   /* dirtylimit */
};

enum pause { NONE, IN_LOOP, IN_HANDLER };

static int vm;
static unsigned char *memory, *copy;
/* The first has what all need, each other what one vCPU writes. */
static struct slot slots[SLOTS];
static struct vcpu vcpus[VCPUS];
static dirtylimit_t *limit;                      /* dirtylimit */
static _Atomic enum pause wanted;
static atomic_bool ending;
static int stands;                               /* a semaphore that a signal handler may use */
static _Thread_local struct vcpu *self;

static void die(const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	fputs("vmm: ", stderr);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
	exit(1);
}

static int sys(int result, const char *call)
{
	if (result < 0)
		die("%s: %s", call, strerror(errno));
	return result;
}

static int ok(int result, const char *call)
{
	if (result < 0)
		die("%s: %s: %s", call, strerror(-result), dirtylimit_last_error());
	return result;
}

static uint64_t now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000 * MS + (uint64_t)time.tv_nsec;
}

static void sleep_ms(unsigned ms)
{
	struct timespec time = { ms / 1000, (long)(ms % 1000 * MS) };
	nanosleep(&time, NULL);
}

/* ---- vCPU threads ---- */

static void semaphore_up(int fd)
{
	const uint64_t one = 1;
	if (write(fd, &one, sizeof one) != sizeof one)
		abort();
}

static void semaphore_down(int fd)
{
	uint64_t one;
	while (read(fd, &one, sizeof one) != sizeof one)
		if (errno != EINTR)
			abort();
}

/* Async-signal-safe. */
static void stand_still(void)
{
	semaphore_up(stands);
	semaphore_down(self->resume);
}

/* The kick. It may come in the middle of dirtylimit_before_run(), and stay as long as it likes. */
static void on_kick(int signal)
{
	int before = errno;
	(void)signal;
	self->run->immediate_exit = 1;
	if (wanted == IN_HANDLER)
		stand_still();
	errno = before;
}

static void *run_vcpu(void *argument)
{
	struct vcpu *vcpu = self = argument;
	sigset_t kick;
	sigemptyset(&kick);
	sigaddset(&kick, SIGUSR1);
	pthread_sigmask(SIG_UNBLOCK, &kick, NULL);
	for (;;) {
		vcpu->run->immediate_exit = 0; /* before what it was set for is looked at */
		if (ending)
			return NULL;
		if (wanted == IN_LOOP)
			stand_still();
		/* dirtylimit: pays what is owed */
		if (ok(dirtylimit_before_run(vcpu->paced, NULL), "before_run") == DIRTYLIMIT_RETURN)
			continue;
		if (ioctl(vcpu->fd, KVM_RUN, 0) < 0) {
			if (errno != EINTR && errno != EAGAIN)
				die("KVM_RUN: %s", strerror(errno));
			continue;
		}
		if (vcpu->run->exit_reason != KVM_EXIT_DIRTY_RING_FULL) /* dirtylimit: before_run sees it */
			die("the guest has stopped, exit reason %u", vcpu->run->exit_reason);
	}
}

static void kick_all(void)
{
	for (int i = 0; i < VCPUS; i++)
		pthread_kill(vcpus[i].thread, SIGUSR1);
}

/* Stops all vCPUs; gives the time that it took. */
static uint64_t pause_vm(enum pause where)
{
	uint64_t start = now();
	wanted = where;
	kick_all();
	for (int i = 0; i < VCPUS; i++)
		semaphore_down(stands);
	return now() - start;
}

static void resume_vm(void)
{
	wanted = NONE;
	for (int i = 0; i < VCPUS; i++)
		semaphore_up(vcpus[i].resume);
}

/* ---- the machine ---- */

static void create_vm(int kvm)
{
	dirtylimit_config_t config = { .size = sizeof config, .max_pause_ns = 10 * MS }; /* dirtylimit */

	vm = sys(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	ok(dirtylimit_enable(vm, &config, &limit), "enable"); /* dirtylimit: first of all */
	memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	copy = calloc(1, MEMORY);
	if (memory == MAP_FAILED || !copy)
		die("no memory");
	for (unsigned i = 0; i < SLOTS; i++) {
		struct slot *slot = &slots[i];
		slot->start = i ? LOW + (i - 1) * (uint64_t)WORK : 0;
		slot->bytes = i ? WORK : LOW;
		struct kvm_userspace_memory_region region = {
			.slot = i, .flags = KVM_MEM_LOG_DIRTY_PAGES, .guest_phys_addr = slot->start,
			.memory_size = slot->bytes, .userspace_addr = (uintptr_t)(memory + slot->start),
		};
		ok(dirtylimit_add_slot(limit, i, slot->bytes / PAGE), "add_slot"); /* dirtylimit: before it is created */
		sys(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
		slot->bitmap = calloc(slot->bytes / PAGE / 64, sizeof *slot->bitmap);
	}
	/* Page tables that map all of it one to one, for ring 3, by pages of 2 MiB. */
	uint64_t *tables = (uint64_t *)(void *)memory;
	tables[0x1000 / 8] = 0x2067;
	tables[0x2000 / 8] = 0x3067;
	for (uint64_t i = 0; i < MEMORY >> 21; i++)
		tables[0x3000 / 8 + i] = i << 21 | 0xe7;
	memcpy(memory + IMAGE, guest, (size_t)(guest_end - guest));
}

static void create_vcpu(int kvm, unsigned id)
{
	struct vcpu *vcpu = &vcpus[id];
	int bytes = sys(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[256];
	} cpuid = { .head = { .nent = 256 } };
	struct kvm_sregs sregs;

	vcpu->fd = sys(ioctl(vm, KVM_CREATE_VCPU, id), "KVM_CREATE_VCPU");
	vcpu->resume = sys(eventfd(0, EFD_SEMAPHORE), "eventfd");
	vcpu->run = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
	if (vcpu->run == MAP_FAILED)
		die("cannot map kvm_run");
	ok(dirtylimit_add_vcpu(limit, id, vcpu->fd, &vcpu->paced), "add_vcpu");            /* dirtylimit */
	ok(dirtylimit_interrupter(vcpu->paced, &vcpu->interrupter), "interrupter");        /* dirtylimit */

	struct kvm_segment data = { .limit = ~0u, .selector = 0x2b, .type = 3, .present = 1, .dpl = 3, .db = 1, .s = 1, .g = 1 };
	struct kvm_segment code = data;
	code.selector = 0x33, code.type = 0xb, code.db = 0, code.l = 1;
	sys(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), "KVM_GET_SUPPORTED_CPUID");
	sys(ioctl(vcpu->fd, KVM_SET_CPUID2, &cpuid), "KVM_SET_CPUID2"); /* without long mode in it, there is none */
	sys(ioctl(vcpu->fd, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs = code, sregs.ss = sregs.ds = sregs.es = sregs.fs = sregs.gs = data;
	sregs.cr0 = 0x80050033, sregs.cr3 = 0x1000, sregs.cr4 = 0x20, sregs.efer = 0xd01;
	sys(ioctl(vcpu->fd, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	struct kvm_regs regs = {
		.rip = IMAGE, .rflags = 0x202, .rdx = PAGE,
		.rdi = LOW + id * (uint64_t)WORK, .rsi = LOW + (id + 1) * (uint64_t)WORK,
	};
	sys(ioctl(vcpu->fd, KVM_SET_REGS, &regs), "KVM_SET_REGS");
	errno = pthread_create(&vcpu->thread, NULL, run_vcpu, vcpu);
	if (errno)
		die("pthread_create: %s", strerror(errno));
}

/* ---- the copy, as a migration makes it ---- */

/* Copies what a round's log names. */
static void copy_round(dirtylimit_round_t *round)
{
	for (unsigned i = 0; i < SLOTS; i++) {
		struct slot *slot = &slots[i];
		size_t words = slot->bytes / PAGE / 64;
		ok(dirtylimit_merge(round, i, slot->bitmap, words * 8, NULL), "merge"); /* dirtylimit */
		for (size_t word = 0; word < words; word++) {
			for (; slot->bitmap[word]; slot->bitmap[word] &= slot->bitmap[word] - 1) {
				size_t page = word * 64 + (size_t)__builtin_ctzll(slot->bitmap[word]);
				size_t at = slot->start + page * PAGE;
				memcpy(copy + at, memory + at, PAGE);
			}
		}
	}
	dirtylimit_round_free(round);
}

static void copy_running(void)
{
	dirtylimit_round_t *round;
	ok(dirtylimit_round(limit, &round), "round"); /* dirtylimit: instead of KVM_GET_DIRTY_LOG */
	copy_round(round);
}

static void copy_stopped(void)
{
	dirtylimit_round_t *round;
	ok(dirtylimit_last_round(limit, &round), "last_round"); /* dirtylimit: the same, complete */
	copy_round(round);
}

/* Pages of the copy that are not the guest's. */
static unsigned stale_pages(void)
{
	unsigned stale = 0;
	for (size_t at = 0; at < MEMORY; at += PAGE)
		stale += memcmp(copy + at, memory + at, PAGE) != 0;
	return stale;
}

static dirtylimit_status_t query(uint32_t id)
{
	dirtylimit_status_t status = { .size = sizeof status };
	ok(dirtylimit_meter(limit), "meter"); /* up to now */
	ok(dirtylimit_query(limit, id, &status), "query");
	return status;
}

/* Bytes a second that vCPU 0 dirties, while rounds go on. */
static double measure(unsigned ms)
{
	uint64_t start = now(), pages = query(0).net_pages;
	while (now() - start < ms * MS) {
		sleep_ms(20);
		copy_running();
	}
	pages = query(0).net_pages - pages;
	return (double)(pages * PAGE) / ((double)(now() - start) / 1e9);
}

int main(void)
{
	struct sigaction action = { .sa_handler = on_kick }; /* no SA_RESTART */
	const double mib = 1 << 20;
	dirtylimit_throttle_t *throttle;
	dirtylimit_stats_t stats = { .size = sizeof stats };
	sigset_t kick;

	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0) {
		fprintf(stderr, "vmm: SKIPPED: /dev/kvm does not open (%s): this needs a host with KVM\n", strerror(errno));
		return 77;
	}
	alarm(120); /* what hangs ends */
	sigaction(SIGUSR1, &action, NULL);
	sigemptyset(&kick);
	sigaddset(&kick, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &kick, NULL); /* until a vCPU's thread knows which it is */
	stands = sys(eventfd(0, EFD_SEMAPHORE), "eventfd");

	create_vm(kvm);
	ok(dirtylimit_throttle_start(limit, 50 * MS, &throttle), "throttle_start"); /* dirtylimit */
	for (unsigned id = 0; id < VCPUS; id++)
		create_vcpu(kvm, id);
	for (unsigned i = 0; i < SLOTS; i++) /* all of it is to be copied once */
		ok(dirtylimit_mark_dirty(limit, i, 0, slots[i].bytes / PAGE), "mark_dirty");

	measure(500); /* until the guest has touched its memory */
	printf("free: %.1f MiB/s\n", measure(300) / mib);
	ok(dirtylimit_set_limit(limit, 0, LIMIT), "set_limit"); /* dirtylimit */
	measure(1000); /* it notices its limit when its ring is full */
	double rate = measure(3000), error = 100 * (rate / (double)LIMIT - 1);
	dirtylimit_status_t status = query(0);
	printf("limit %.1f MiB/s: %.2f MiB/s, %+.2f %%, paused %.1f s in all\n", (double)LIMIT / mib, rate / mib, error,
	       (double)status.paused_us / 1e6);
	if (status.unenforced != DIRTYLIMIT_HELD)
		die("the limit is not held: %s", status.unenforced_text);
	if (error > 2) /* below it where the host is busy */
		die("the limit is not held: %+.2f %%", error);

	uint64_t slowest = 0;
	unsigned stale = 0;
	for (int i = 0; i < 20; i++) {
		sleep_ms(30);
		copy_running();
		uint64_t took = pause_vm(i % 2 ? IN_HANDLER : IN_LOOP);
		slowest = took > slowest ? took : slowest;
		/* A device writes: KVM does not know. */
		memory[SCRATCH] ^= 1;
		ok(dirtylimit_mark_dirty(limit, 0, SCRATCH / PAGE, 1), "mark_dirty"); /* dirtylimit */
		stale += stale_pages();
		copy_stopped();
		unsigned lost = stale_pages();
		if (lost)
			die("%u pages are lost", lost);
		resume_vm();
	}
	printf("stopped 20 times, within %.1f ms; %u pages to copy then, 0 lost\n", (double)slowest / MS, stale);
	if (stale < 20 * VCPUS)
		die("so few pages were dirty that this shows nothing");

	ok(dirtylimit_set_limit(limit, 0, DIRTYLIMIT_UNLIMITED), "set_limit");
	printf("free again: %.1f MiB/s\n", measure(300) / mib);
	ok(dirtylimit_stats(limit, &stats), "stats");
	printf("%llu entries reset, %llu of unknown slots\n", (unsigned long long)stats.resets,
	       (unsigned long long)stats.dropped);

	ending = true;
	for (unsigned id = 0; id < VCPUS; id++)
		ok(dirtylimit_interrupt(vcpus[id].interrupter), "interrupt"); /* not needed: the kick is a signal */
	kick_all();
	for (unsigned id = 0; id < VCPUS; id++) {
		pthread_join(vcpus[id].thread, NULL);
		dirtylimit_interrupter_free(vcpus[id].interrupter);
		ok(dirtylimit_vcpu_free(vcpus[id].paced), "vcpu_free");
		ok(dirtylimit_remove_vcpu(limit, id), "remove_vcpu");
		close(vcpus[id].fd);
	}
	dirtylimit_throttle_stop(throttle);
	for (unsigned i = 0; i < SLOTS; i++) {
		ok(dirtylimit_remove_slot(limit, i), "remove_slot");
		free(slots[i].bitmap);
	}
	dirtylimit_free(limit);
	free(copy);
	close(vm);
	return 0;
}
