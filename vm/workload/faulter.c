/*
 * faulter CALLS: make a system call exactly CALLS times with a pointer to memory that is not there.
 *
 * The call is ioctl(FIONBIO), which reads an int with get_user(). Prints how many calls succeeded
 * and how many failed with EFAULT.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	long calls = argc > 1 ? atol(argv[1]) : 0;
	long succeeded = 0, faulted = 0;
	int fds[2];

	if (calls < 1 || pipe(fds)) {
		fprintf(stderr, "usage: faulter CALLS\n");
		return 2;
	}
	for (long i = 0; i < calls; i++) {
		if (!syscall(SYS_ioctl, fds[0], FIONBIO, 4096L))
			succeeded++;
		else
			faulted += errno == EFAULT;
	}
	printf("%ld %ld\n", succeeded, faulted);
	return 0;
}
