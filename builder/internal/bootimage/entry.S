# This code starts a 64-bit Linux kernel whose program segments are in memory already.
# On entry, the machine is in the state of the PVH protocol of Xen and qemu: 32 bits,
# paging off, %ebx points to hvm_start_info. At the jump to the kernel, it is in the
# state of Linux's 64-bit boot protocol: long mode, 4 GiB mapped one to one, %rsi points
# to boot_params. The image has the constants of boot_params and the page tables; see
# entry in image.go.
	.set ZERO, 0x101000		# boot_params
	.set PML4, 0x102000
	.code32
	.globl start
start:	cld
	movl 48(%ebx), %ecx		# memmap_entries
	cmpl $128, %ecx
	jbe 1f
	movl $128, %ecx
1:	movb %cl, ZERO+0x1e8		# e820_entries
	movl 40(%ebx), %esi		# memmap, 24 bytes each
	movl $ZERO+0x2d0, %edi		# e820_table, 20 bytes each
2:	jecxz 3f
	movsl
	movsl
	movsl
	movsl
	movsl
	lodsl
	decl %ecx
	jmp 2b
3:	movl 24(%ebx), %eax		# cmdline_paddr
	movl %eax, ZERO+0x228		# cmd_line_ptr
	movl 32(%ebx), %eax		# rsdp_paddr
	movl %eax, ZERO+0x70		# acpi_rsdp_addr
	cmpl $0, 12(%ebx)		# nr_modules
	je 4f
	movl 16(%ebx), %esi		# modlist_paddr
	movl (%esi), %eax
	movl %eax, ZERO+0x218		# ramdisk_image
	movl 8(%esi), %eax
	movl %eax, ZERO+0x21c		# ramdisk_size
4:	lgdt gdtr
	movl %cr4, %eax
	orl $0x20, %eax			# PAE
	movl %eax, %cr4
	movl $PML4, %eax
	movl %eax, %cr3
	movl $0xc0000080, %ecx		# EFER
	rdmsr
	orl $0x100, %eax		# LME
	wrmsr
	movl %cr0, %eax
	orl $0x80000000, %eax		# PG
	movl %eax, %cr0
	ljmp $0x10, $long
	.code64
long:	movl $0x18, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	movl $ZERO, %esi
	jmp *kernel(%rip)
	.balign 8
gdt:	.quad 0, 0, 0x00af9b000000ffff, 0x00cf93000000ffff	# 0x10 code, 0x18 data
gdtr:	.word gdtr - gdt - 1
	.long gdt
	.balign 8
kernel:	.quad 0				# the last 8 bytes: the kernel's entry
