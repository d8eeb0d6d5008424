/* Functions that begin with every kind of instruction that a jump displaces,
 * and all that they leave behind.
 *
 *   exact ROUNDS THREADS TIMER_US
 *
 * Each thread calls each function ROUNDS times with all registers, flags,
 * MXCSR, the x87 stack, the red zone and the stack above filled, and hashes
 * what is there after the return. Prints "name hash" of each function, or
 * "name differs" if two calls did not leave the same. With TIMER_US a signal
 * arrives that often, whose handler uses as much of it all as it can.
 * Built -no-pie with stacks at fixed addresses: two runs print the same.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>

struct state {
	uint64_t gprs[16];              /* rax rcx rdx rbx - rbp rsi rdi r8.. */
	uint8_t ymm[16][32];            /* at 128 */
	uint8_t fpu[512];               /* at 640: fxsave64 */
	uint64_t flags, exit_rsp;       /* at 1152; flags as lahf, seto */
	uint8_t stack[512];             /* from 128 below rsp on */
} __attribute__((aligned(64)));

int has_avx;
static volatile long n_signals;

/* run(fn, state, stack): on that stack, with that state, and back. */
extern void run(void *fn, struct state *state, void *stack);
asm(".text\n"
    ".type run, @function\n"
    "run:\n"
    "push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
    "mov %rsp, %fs:saved_rsp@tpoff\n"
    "mov %rsi, %fs:saved_state@tpoff\n"
    "mov %rdx, %rsp\n"
    "sub $256, %rsp; push %rdi\n"           /* what it calls */
    "fxrstor64 640(%rsi)\n"
    "cmpl $0, has_avx\n"
    "je 1f\n"
#define Y(n) "vmovdqu 128+32*" #n "(%rsi), %ymm" #n "\n"
    Y(0) Y(1) Y(2) Y(3) Y(4) Y(5) Y(6) Y(7) Y(8) Y(9) Y(10) Y(11) Y(12)
    Y(13) Y(14) Y(15)
#undef Y
    "1: mov $0x5a5a, %rax; mov $15, %rcx\n" /* fill the red zone */
    "2: mov %rax, -128(%rsp,%rcx,8); add $0x1111, %rax; dec %rcx; jg 2b\n"
    "push 1152(%rsi); popf\n"
    "mov 0(%rsi), %rax; mov 8(%rsi), %rcx; mov 16(%rsi), %rdx\n"
    "mov 24(%rsi), %rbx; mov 40(%rsi), %rbp; mov 56(%rsi), %rdi\n"
    "mov 64(%rsi), %r8; mov 72(%rsi), %r9; mov 80(%rsi), %r10\n"
    "mov 88(%rsi), %r11; mov 96(%rsi), %r12; mov 104(%rsi), %r13\n"
    "mov 112(%rsi), %r14; mov 120(%rsi), %r15; mov 48(%rsi), %rsi\n"
    "call *(%rsp)\n"
    ".globl behind\n"
    "behind: mov %rsi, %fs:saved_rsi@tpoff\n"
    "mov %fs:saved_state@tpoff, %rsi\n"
    "mov %rax, 0(%rsi); mov %rcx, 8(%rsi); mov %rdx, 16(%rsi)\n"
    "mov %rbx, 24(%rsi); mov %rbp, 40(%rsi); mov %rdi, 56(%rsi)\n"
    "mov %r8, 64(%rsi); mov %r9, 72(%rsi); mov %r10, 80(%rsi)\n"
    "mov %r11, 88(%rsi); mov %r12, 96(%rsi); mov %r13, 104(%rsi)\n"
    "mov %r14, 112(%rsi); mov %r15, 120(%rsi)\n"
    "mov %rsp, 1160(%rsi)\n"                /* exit_rsp */
    "lahf; seto %al; mov %ax, 1152(%rsi)\n"
    "mov %fs:saved_rsi@tpoff, %rax; mov %rax, 48(%rsi)\n"
    "fxsave64 640(%rsi)\n"
    "cld\n"
    "cmpl $0, has_avx\n"
    "je 1f\n"
#define Y(n) "vmovdqu %ymm" #n ", 128+32*" #n "(%rsi)\n"
    Y(0) Y(1) Y(2) Y(3) Y(4) Y(5) Y(6) Y(7) Y(8) Y(9) Y(10) Y(11) Y(12)
    Y(13) Y(14) Y(15)
#undef Y
    "vzeroupper\n"
    "1: mov %fs:saved_rsp@tpoff, %rsp\n"
    "fninit; push $0x1f80; ldmxcsr (%rsp); add $8, %rsp\n"
    "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx; ret\n"
    ".section .tbss,\"awT\",@nobits\n"
    ".balign 8\n"
    "saved_rsp: .zero 8\n"
    "saved_state: .zero 8\n"
    "saved_rsi: .zero 8\n"
    ".text\n");

/* CASE(name, code): rdi and r15 point to 256 bytes, rcx is 3, r14 names
 * `other`, and code need not return with ret itself. */
#define CASE(name, code) \
	asm(".text\n.balign 32\n.globl case_" #name "\n" \
	    ".type case_" #name ", @function\ncase_" #name ":\n" code \
	    "\nret\n.size case_" #name ", . - case_" #name "\n"); \
	extern char case_##name[];
asm(".text\n.balign 16\n.type other, @function\nother:\n"
    "mov (%rsp), %rax; add %rax, %r13; ret\n.size other, . - other\n");
extern char other[];

CASE(push, "push %rbx; mov (%rsp), %rax; pop %rdx; add %rdx, %rax")
CASE(push_rsp, "push %rsp; pop %rax; sub %rsp, %rax; adc $0, %r8")
CASE(pushf, "pushfq; pop %rax; add %rax, %r8; adc %rax, %r9")
CASE(enter, "enter $16, $0; mov %rax, -8(%rbp); leave; nop")
CASE(red_zone, "mov %rax, -8(%rsp); mov -64(%rsp), %rdx; mov -8(%rsp), %r8")
CASE(red_zone_below, "mov -120(%rsp), %rax; mov %rax, -128(%rsp)\n"
     "mov -128(%rsp), %rbx; mov -112(%rsp), %r9")
CASE(carry, "adc %r10, %rax; adc %r11, %rdx; setc %bl")
CASE(overflow, "seto %al; setp %bl; setc %cl; lahf; sahf; nop")
CASE(r10_r11, "lea (%r10,%r11), %rax; xchg %r10, %r11; add %r10, %rdx")
CASE(call, "call other; lea 1(%rax), %rax; nop")
CASE(call_reg, "call *%r14; lea 1(%rax), %rax; nop; nop")
CASE(call_rsp, "push %r14; call *(%rsp); pop %rdx; lea 1(%rax), %rax")
CASE(call_rip, "call *1f(%rip); jmp 2f; 1: .quad other; 2:")
CASE(get_pc, "call 1f; 1: pop %rax; mov %rax, %rbx; nop")
CASE(jcc_taken, "stc; jc 1f; inc %rax; 1: lea 3(%rax), %rax; nop; nop")
CASE(jcc_not, "clc; jc 1f; inc %rax; 1: lea 3(%rax), %rax; nop; nop")
CASE(loop, "nop; loop 1f; inc %rax; nop; 1: lea 3(%rcx), %rdx")
CASE(jrcxz, "nop; jrcxz 1f; inc %rax; nop; 1: lea 3(%rcx), %rdx")
CASE(jmp_reg, "lea 1f(%rip), %rax; notrack jmp *%rax; int3; 1: inc %rdx")
CASE(movsb, "lea 8(%rdi), %rsi; rep movsb; mov %rsi, %rax")
CASE(std, "std; lea 64(%rdi), %rdi; stosb; cld; mov %rdi, %rax")
CASE(lock, "lock xadd %rax, (%rdi); lock decq 8(%rdi)")
CASE(rip_load, "mov 1f(%rip), %rax; jmp 2f; 1: .quad 0x123456789; 2:")
CASE(rip_lea, "lea (%rip), %rax; lea case_rip_lea(%rip), %rdx")
CASE(syscall, "mov $0xffff, %eax; syscall; mov %rcx, %rdx; nop")
CASE(syscall_first, "syscall; nop; nop; nop; mov %rcx, %rdx")
CASE(ret_imm, "pop %rdx; push %rdx; push %rdx; ret $8")
CASE(x87, "fld1; fldpi; faddp; fstl (%rdi); fstcw 8(%rdi)")
CASE(mxcsr, "stmxcsr (%rdi); orl $0x6000, (%rdi); ldmxcsr (%rdi)")
CASE(sse, "addps %xmm1, %xmm2; mulpd %xmm3, %xmm4; cvttss2si %xmm5, %eax")
CASE(bmi_like, "bsf %r8, %rax; bswap %r9; imul $7, %r10, %r11")
CASE(cpuid_free, "xchg %rax, %r12; xlat; cmpxchg %r9, (%r15)")
CASE(endbr64, "endbr64; push %rbp; mov %rsp, %rbp; pop %rbp; nop")
CASE(dead_flags, "xor %eax, %eax; cmp %r8, %r9; cmovb %r10, %rax")
/* Branches that lead into the first five bytes. */
CASE(round, "xor %eax, %eax; 1: add %rcx, %rax; dec %rcx; jnz 1b")
CASE(round_loop, "stc; 1: adc %rcx, %rax; loop 1b")
CASE(round_jrcxz, "nop; 1: dec %rcx; jrcxz 2f; jmp 1b; 2: nop")
CASE(round_ret, "xor %eax, %eax; 1: inc %eax; cmp %ecx, %eax; jne 2f\n"
     "pop %r8; push %r8; ret; 2: lea 7(%rdx), %rdx; jmp 1b")
CASE(round_call, "push %rcx; 1: inc %rax; dec %rcx; jnz 1b; pop %rcx\n"
     "call other; nop")
CASE(forward, "test %ecx, %ecx; jnz 1f; nop; 1: inc %rax; nop")
CASE(two_rounds, "push %rcx; 1: inc %rax; 2: adc %r9, %rdx; dec %ecx\n"
     "jz 3f; test $1, %cl; jz 1b; jmp 2b; 3: pop %rcx")
CASE(recurse, "test %ecx, %ecx; je 1f; push %rcx; dec %ecx\n"
     "call case_recurse; pop %rcx; add %rcx, %rax; 1:")
CASE(avx, "vaddps %ymm1, %ymm2, %ymm3; vpcmpeqd %xmm4, %xmm4, %xmm5")
CASE(vzeroupper, "vzeroupper; vpshufd $27, %xmm6, %xmm7; nop")
CASE(vzeroall, "nop; vzeroall; nop; nop; nop")

static const struct { const char *name; char *fn; int is_avx; } cases[] = {
#define C(name) { #name, case_##name, 0 },
C(push) C(push_rsp) C(pushf) C(enter) C(red_zone) C(red_zone_below) C(carry)
C(overflow) C(r10_r11) C(call) C(call_reg) C(call_rsp) C(call_rip) C(get_pc)
C(jcc_taken) C(jcc_not) C(loop) C(jrcxz) C(jmp_reg) C(movsb) C(std) C(lock)
C(rip_load) C(rip_lea) C(syscall) C(syscall_first) C(ret_imm) C(x87) C(mxcsr)
C(sse) C(bmi_like) C(cpuid_free) C(endbr64) C(dead_flags) C(recurse)
C(round) C(round_loop) C(round_jrcxz) C(round_ret) C(round_call) C(forward)
C(two_rounds)
#undef C
	{ "avx", case_avx, 1 }, { "vzeroupper", case_vzeroupper, 1 },
	{ "vzeroall", case_vzeroall, 1 },
};
#define N_CASES (int)(sizeof cases / sizeof cases[0])

static uint64_t hashes[16][64];
static int rounds, n_threads;

static uint64_t hash(uint64_t h, const void *data, size_t size)
{
	for (const uint8_t *p = data; size--; p++)
		h = (h ^ *p) * 0x100000001b3;
	return h;
}

static uint64_t one(int n, char *area)
{
	static const int order[] = {0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13,
				    14, 15};
	struct state state;
	char *stack = area + 8192, *data = area + 16384;
	uint64_t h = 0xcbf29ce484222325;

	memset(&state, 0, sizeof state);
	memset(area, 0, 16384 + 256);
	for (int i = 0; i < 256; i++) {
		data[i] = i * 7;
		stack[i] = i * 13;
	}
	for (int i = 0; i < 15; i++)
		state.gprs[order[i]] = 0x0123456789abcdef * (i + 3);
	state.gprs[0] = 0xffff;
	state.gprs[1] = 3;
	state.gprs[3] = state.gprs[15] = state.gprs[7] = (uint64_t)data;
	state.gprs[14] = (uint64_t)other;
	state.flags = 0xad7 ^ 0x200;            /* C P A Z S O, no IF */
	state.flags |= 0x200;
	for (int i = 0; i < 16; i++)
		for (int j = 0; j < 32; j++)
			state.ymm[i][j] = j % 4 == 3 ? 0x3f : i * 32 + j;
	state.fpu[0] = 0x7f; state.fpu[1] = 0x03;
	state.fpu[24] = 0x80; state.fpu[25] = 0x3f; /* MXCSR: rounds down */
	for (int i = 0; i < 16; i++)
		memcpy(state.fpu + 160 + 16 * i, state.ymm[i], 16);
	run(cases[n].fn, &state, stack);
	memcpy(state.stack, (char *)state.exit_rsp - 128, 512);
	/* The x87 instruction and data pointers tell where it ran. */
	memset(state.fpu + 6, 0, 18);
	h = hash(h, &state, sizeof state);
	return hash(h, data, 256);
}

static void *work(void *number)
{
	long which = (long)number;
	char *area = mmap((void *)(0x10000000 + which * 0x100000), 0x10000,
			  PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS
			  | MAP_FIXED, -1, 0);

	if (area == MAP_FAILED)
		abort();
	for (int i = 0; i < rounds; i++)
		for (int n = 0; n < N_CASES; n++) {
			if (cases[n].is_avx && !has_avx)
				continue;
			uint64_t h = one(n, area);
			if (i && h != hashes[which][n])
				h = 1;
			hashes[which][n] = h;
			if (h == 1)
				i = rounds;
		}
	return NULL;
}

static void handler(int signo)
{
	char room[256];

	(void)signo;
	__sync_fetch_and_add(&n_signals, 1);
	memset(room, 0xee, sizeof room);
	asm volatile("fninit; fldz; pcmpeqd %%xmm0, %%xmm0\n"
		     "movdqa %%xmm0, %%xmm5; std; cld" : : "r"(room)
		     : "memory", "xmm0", "xmm5");
	if (has_avx)
		asm volatile("vpcmpeqd %%xmm1, %%xmm1, %%xmm1; vzeroall"
			     : : : "xmm1");
}

int main(int argc, char **argv)
{
	pthread_t threads[16];
	struct sigaction action = { .sa_handler = handler,
				    .sa_flags = SA_RESTART };

	if (argc != 4)
		return 2;
	has_avx = __builtin_cpu_supports("avx");
	rounds = atoi(argv[1]);
	n_threads = atoi(argv[2]);
	if (atoi(argv[3])) {
		struct itimerval every = { { 0, atoi(argv[3]) },
					   { 0, atoi(argv[3]) } };
		sigaction(SIGALRM, &action, NULL);
		setitimer(ITIMER_REAL, &every, NULL);
	}
	for (long i = 1; i < n_threads; i++)
		pthread_create(&threads[i], NULL, work, (void *)i);
	work((void *)0);
	for (long i = 1; i < n_threads; i++)
		pthread_join(threads[i], NULL);
	for (int n = 0; n < N_CASES; n++)
		for (int i = 0; i < n_threads; i++)
			if (hashes[i][n] == 1)
				printf("%s differs\n", cases[n].name);
			else
				printf("%s %d %016lx\n", cases[n].name, i,
				       hashes[i][n]);
	fprintf(stderr, "%ld\n", n_signals);
	return 0;
}
