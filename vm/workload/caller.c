/*
 * caller THREADS CALLS [MICROSECONDS]: make a cheap system call exactly CALLS times in all.
 *
 * The calls, getpgid(0) with the number of the call as an argument that it does not look at, are
 * dealt out evenly over THREADS threads, each bound to a CPU of its own
 * as far as there are enough. With MICROSECONDS each call is instead clock_nanosleep() of that
 * time, which sleeps inside of the kernel, and the threads are bound to no CPU. Prints the calls
 * made and the nanoseconds that a call took.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct share {
	pthread_t thread;
	int number;
	long calls;
};

static long microseconds;

static void *call(void *data)
{
	struct share *share = data;
	struct timespec sleep = {
		.tv_sec = microseconds / 1000000,
		.tv_nsec = microseconds % 1000000 * 1000,
	};
	cpu_set_t set;
	char name[16];

	snprintf(name, sizeof(name), "caller-%d", share->number);
	prctl(PR_SET_NAME, name);
	if (!microseconds) {
		CPU_ZERO(&set);
		CPU_SET(share->number, &set);
		sched_setaffinity(0, sizeof(set), &set);
	}
	for (long i = 0; i < share->calls; i++) {
		if (microseconds)
			syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &sleep, NULL);
		else
			syscall(SYS_getpgid, 0, i);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	struct timespec begin, end;
	long threads, calls;
	struct share *shares;

	threads = argc > 2 ? atol(argv[1]) : 0;
	calls = argc > 2 ? atol(argv[2]) : 0;
	microseconds = argc > 3 ? atol(argv[3]) : 0;
	if (threads < 1 || calls < 1) {
		fprintf(stderr, "usage: caller THREADS CALLS [MICROSECONDS]\n");
		return 2;
	}
	shares = calloc(threads, sizeof(*shares));
	clock_gettime(CLOCK_MONOTONIC, &begin);
	for (long t = 0; t < threads; t++) {
		shares[t].number = t;
		shares[t].calls = calls / threads + (t < calls % threads);
		pthread_create(&shares[t].thread, NULL, call, &shares[t]);
	}
	for (long t = 0; t < threads; t++)
		pthread_join(shares[t].thread, NULL);
	clock_gettime(CLOCK_MONOTONIC, &end);
	printf("%ld %ld\n", calls,
	       ((end.tv_sec - begin.tv_sec) * 1000000000L + end.tv_nsec - begin.tv_nsec) / calls);
	return 0;
}
