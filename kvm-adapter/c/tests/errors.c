/* What the C interface answers to mistakes, without KVM: /dev/null stands for a VM. */
#include <dirtylimit.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CHECK(condition) check(!!(condition), #condition, __LINE__)
/* The answer, and a part of the text that goes with it. */
#define FAILS(call, number, part) fails((call), (number), (part), #call, __LINE__)

static void check(int holds, const char *what, int line)
{
	if (!holds) {
		fprintf(stderr, "errors.c:%d: not so: %s (last error: %s)\n", line, what, dirtylimit_last_error());
		exit(1);
	}
}

static void fails(int answer, int number, const char *part, const char *what, int line)
{
	check(answer == -number && strstr(dirtylimit_last_error(), part) != NULL, what, line);
}

static int always(void *opaque)
{
	++*(int *)opaque;
	return 1;
}

static void *other_thread(void *null)
{
	dirtylimit_status_t status = { .size = sizeof status };
	CHECK(dirtylimit_last_error()[0] == '\0');
	FAILS(dirtylimit_query(NULL, 0, &status), EINVAL, "limit is NULL");
	return null;
}

int main(void)
{
	struct {
		dirtylimit_config_t known;
		uint64_t later;
	} newer = { { .size = sizeof newer }, 0 };
	dirtylimit_config_t config = { .size = sizeof config };
	dirtylimit_t *limit = (dirtylimit_t *)&config;
	dirtylimit_vcpu_t *vcpu = (dirtylimit_vcpu_t *)&config;
	dirtylimit_round_t *round;
	dirtylimit_throttle_t *throttle;
	dirtylimit_interrupter_t *interrupter;
	uint64_t word = 0, pages = 0;
	int asked = 0, null = open("/dev/null", O_RDWR);
	pthread_t thread;

	CHECK(dirtylimit_version() == DIRTYLIMIT_VERSION);
	CHECK(!strcmp(dirtylimit_last_error(), ""));
	CHECK(dirtylimit_ring_for(300000000, 1250000000, 8) == 4096);

	/* What is no VM. errno stays. */
	errno = EDOM;
	FAILS(dirtylimit_enable(-1, NULL, &limit), EBADF, "descriptor");
	CHECK(limit == NULL && errno == EDOM);
	FAILS(dirtylimit_enable(null, &config, &limit), ENOTTY, "KVM_CHECK_EXTENSION");
	FAILS(dirtylimit_enable(null, NULL, NULL), EINVAL, "limit is NULL");

	/* Configurations, before anything else is looked at. */
	FAILS(dirtylimit_enable(null, &newer.known, &limit), ENOTTY, "KVM_CHECK_EXTENSION");
	newer.later = 1;
	FAILS(dirtylimit_enable(null, &newer.known, &limit), E2BIG, "asks for what");
	config.size = 8;
	FAILS(dirtylimit_enable(null, &config, &limit), EINVAL, "too small");
	config.size = 1 << 20;
	FAILS(dirtylimit_enable(null, &config, &limit), E2BIG, "too large");
	config.size = sizeof config;
	config.kick = 4;
	FAILS(dirtylimit_enable(null, &config, &limit), EINVAL, "kick");
	config.kick = DIRTYLIMIT_KICK_VMM;
	config.flags = 2;
	FAILS(dirtylimit_enable(null, &config, &limit), EINVAL, "flags");

	/* No handle. */
	FAILS(dirtylimit_add_slot(NULL, 0, 1), EINVAL, "limit is NULL");
	FAILS(dirtylimit_remove_slot(NULL, 0), EINVAL, "limit is NULL");
	FAILS(dirtylimit_add_vcpu(NULL, 0, 0, &vcpu), EINVAL, "limit is NULL");
	CHECK(vcpu == NULL);
	FAILS(dirtylimit_add_vcpu(NULL, 0, 0, NULL), EINVAL, "vcpu is NULL");
	FAILS(dirtylimit_remove_vcpu(NULL, 0), EINVAL, "limit is NULL");
	FAILS(dirtylimit_before_run(NULL, &word), EINVAL, "vcpu is NULL");
	FAILS(dirtylimit_before_run_unless(NULL, always, &asked, &word), EINVAL, "vcpu is NULL");
	FAILS(dirtylimit_interrupter(NULL, &interrupter), EINVAL, "vcpu is NULL");
	FAILS(dirtylimit_interrupt(NULL), EINVAL, "interrupter is NULL");
	FAILS(dirtylimit_round(NULL, &round), EINVAL, "limit is NULL");
	FAILS(dirtylimit_set_draining(NULL, 1), EINVAL, "limit is NULL");
	FAILS(dirtylimit_last_round(NULL, &round), EINVAL, "limit is NULL");
	FAILS(dirtylimit_merge(NULL, 0, &word, sizeof word, &pages), EINVAL, "round is NULL");
	FAILS(dirtylimit_peek(NULL, 0, &word, sizeof word), EINVAL, "limit is NULL");
	FAILS(dirtylimit_mark_dirty(NULL, 0, 0, 1), EINVAL, "limit is NULL");
	FAILS(dirtylimit_trust_slot(NULL, 0), EINVAL, "limit is NULL");
	FAILS(dirtylimit_set_limit(NULL, 0, 1), EINVAL, "limit is NULL");
	FAILS(dirtylimit_set_limit_all(NULL, 1), EINVAL, "limit is NULL");
	FAILS(dirtylimit_set_vm_limit(NULL, 1), EINVAL, "limit is NULL");
	FAILS(dirtylimit_set_weight(NULL, 0, 1), EINVAL, "limit is NULL");
	FAILS(dirtylimit_set_max_pause(NULL, 1), EINVAL, "limit is NULL");
	FAILS(dirtylimit_query(NULL, 0, NULL), EINVAL, "limit is NULL");
	FAILS(dirtylimit_stats(NULL, NULL), EINVAL, "limit is NULL");
	FAILS(dirtylimit_meter(NULL), EINVAL, "limit is NULL");
	FAILS(dirtylimit_tick(NULL), EINVAL, "limit is NULL");
	FAILS(dirtylimit_run_throttle(NULL, 1, always, &asked), EINVAL, "limit is NULL");
	FAILS(dirtylimit_throttle_start(NULL, 1, &throttle), EINVAL, "limit is NULL");
	CHECK(!round && !throttle && !interrupter && !word && !pages && !asked);
	CHECK(dirtylimit_page_size(NULL) == 0);
	CHECK(dirtylimit_round_published(NULL) == 0 && dirtylimit_round_held_back(NULL) == 0);

	/* What frees takes NULL. */
	dirtylimit_free(NULL);
	dirtylimit_round_free(NULL);
	dirtylimit_throttle_stop(NULL);
	dirtylimit_interrupter_free(NULL);
	CHECK(dirtylimit_vcpu_free(NULL) == 0);

	/* Each thread has a last error of its own. */
	CHECK(pthread_create(&thread, NULL, other_thread, NULL) == 0);
	CHECK(pthread_join(thread, NULL) == 0);
	CHECK(strstr(dirtylimit_last_error(), "limit is NULL"));
	close(null);
	return 0;
}
